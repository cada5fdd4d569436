package main

// What operators and their Prometheus read: the metrics, and the files under contrib
// that use them.

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recordpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/peer"
)

// scrape returns the relay's metrics by name and labels, and the whole text.
func scrape(t testing.TB, r testRelay) (map[string]float64, string) {
	t.Helper()
	w := httptest.NewRecorder()
	newMetricsHandler(r.registry, slog.New(slog.DiscardHandler)).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("GET /metrics = %d %s", w.Code, w.Body)
	}
	text := w.Body.String()
	values := make(map[string]float64)
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		line = strings.TrimSpace(line)
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			t.Fatalf("metric %q: %v", line, err)
		}
		values[line[:i]] = value
	}
	return values, text
}

// ours returns the relay's own metrics that are not zero, except those that depend on
// the build.
func ours(values map[string]float64) map[string]float64 {
	found := make(map[string]float64)
	for name, value := range values {
		if short, ok := strings.CutPrefix(name, "privstack_relay_"); ok && value != 0 && !strings.HasPrefix(short, "build_info") {
			found[short] = value
		}
	}
	return found
}

// Graphs and alerts are only as good as these numbers. And no user of the relay has
// agreed to appear in them.
func TestMetricsAreRightAndNameNobody(t *testing.T) {
	ctx := testContext(t)
	r := newTestRelayWithin(t, limits{clients: 4, perNetwork: 256}, defaultConfig(t, "--metrics=127.0.0.1:0"), newTestKey(t))
	if values, _ := scrape(t, r); fmt.Sprint(ours(values)) != fmt.Sprint(map[string]float64{"max_clients": 4}) {
		t.Errorf("metrics of an idle relay = %v, want nothing but max_clients", ours(values))
	}

	// Three clients are connected, one of them twice. A fourth came and left.
	crowd := newCrowd(t, 1)
	dial := func(who lightIdentity) *lightClient {
		t.Helper()
		c, err := crowd.dial(ctx, who, r.info)
		if err != nil {
			t.Fatal(err)
		}
		c.mustAsk(t, kadpb.NewMessage(kadpb.Message_PING, nil, 0)) // now it is certainly connected
		return c
	}
	alice, bob, carol, gone := dial(newLightIdentity(t)), dial(newLightIdentity(t)), dial(newLightIdentity(t)), dial(newLightIdentity(t))
	gone.CloseWithError(0, "")
	eventually(t, "the relay sees that one left", func() bool { return r.counters().connections == 3 })
	dial(carol.lightIdentity)

	// The relay is full: it refuses one more.
	if c, err := crowd.newcomer(ctx, r.info); err == nil {
		<-c.Context().Done()
	}

	// One record is stored and one refused, and devices ask questions.
	key := []byte(recordPrefix + "syncgroup/secret")
	put := func(key []byte) error {
		req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
		req.Record = &recordpb.Record{Key: key, Value: []byte("phone at 192.168.1.10")}
		_, err := alice.ask(ctx, req)
		return err
	}
	if err := put(key); err != nil {
		t.Fatal(err)
	}
	if err := put([]byte("/elsewhere/secret")); err == nil {
		t.Error("the relay accepted a record outside /privstack/")
	}
	for range 2 {
		bob.mustAsk(t, getMessage(key))
	}
	for range 3 {
		bob.mustAsk(t, findMessage([]byte(alice.id)))
	}
	if _, err := bob.ask(ctx, kadpb.NewMessage(kadpb.Message_ADD_PROVIDER, key, 0)); err == nil {
		t.Error("the relay accepted a provider")
	}
	s, err := bob.open(ctx, string(kadProtocol))
	if err != nil {
		t.Fatal(err)
	}
	s.Write(binary.AppendUvarint(nil, maxKadMessage+1))
	if _, err := io.ReadAll(s); err == nil {
		t.Error("the relay accepted a message that is too long")
	}

	// Two reservations, one of them renewed; a circuit that carries a known number of
	// bytes each way; and one to a device without a reservation.
	for _, c := range []*lightClient{alice, alice, bob} {
		if err := c.reserve(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := alice.circuit(ctx, carol.id); err == nil {
		t.Error("a circuit to a device without a reservation was opened")
	}
	answered := make(chan error, 1)
	go func() { // ends with the circuit, or ctx
		there, err := bob.accept(ctx)
		if err == nil {
			_, err = io.CopyN(io.Discard, there, 100_000)
		}
		if err == nil {
			_, err = there.Write(make([]byte, 7000))
		}
		answered <- err
	}()
	here, err := alice.circuit(ctx, bob.id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := here.Write(make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(here, make([]byte, 7000)); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Fatal(err)
	}
	// The relay may not have counted yet what has arrived already.
	eventually(t, "the relay counts what the circuit carried", func() bool { return r.counters().relayedBytes >= 107_000 })

	want := map[string]float64{
		"max_clients": 4, "clients": 3, "connections": 4, "peers_served_total": 4,
		"reservations": 2, "circuits": 1, `relayed_connections_total{kind="circuit"}`: 1, `relayed_bytes_total{kind="circuit"}`: 107_000,
		"dht_records":                    1,
		`requests_total{type="ping"}`:    5,
		`requests_total{type="reserve"}`: 3, `requests_total{type="connect"}`: 2,
		`requests_total{type="put_value"}`: 2, `requests_total{type="get_value"}`: 2,
		`requests_total{type="find_node"}`: 3, `requests_total{type="other"}`: 1,
		`refusals_total{reason="record"}`: 1, `refusals_total{reason="dht_message_too_long"}`: 1,
		`refusals_total{reason="circuit_no_reservation"}`: 1,
	}
	check := func(want map[string]float64) (text string) {
		t.Helper()
		values, text := scrape(t, r)
		got := ours(values)
		if n := got["dht_record_bytes"]; n < 100 || n > 1000+recordOverhead {
			t.Errorf("dht_record_bytes = %v, want what one record takes", n)
		}
		// A client that is refused sends several packets.
		if got[`refusals_total{reason="max_clients"}`] < 1 {
			t.Error("no refusal at max_clients")
		}
		delete(got, "dht_record_bytes")
		delete(got, `refusals_total{reason="max_clients"}`)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			for _, name := range slices.Sorted(maps.Keys(got)) {
				t.Logf("%s %v, want %v", name, got[name], want[name])
			}
			t.Errorf("metrics = %v, want %v", got, want)
		}
		// go-libp2p's own metrics count the same.
		for name, value := range map[string]float64{
			`libp2p_rcmgr_connections{dir="inbound",scope="system"}`: want["connections"],
		} {
			if values[name] != value {
				t.Errorf("%s = %v, want %v", name, values[name], value)
			}
		}
		for _, family := range []string{"libp2p_swarm_", "libp2p_identify_", "libp2p_eventbus_", "go_", "process_"} {
			if !strings.Contains(text, "\n"+family) {
				t.Errorf("no metric begins with %s", family)
			}
		}
		return text
	}
	texts := check(want)

	// Everyone leaves. The totals stay.
	for _, c := range []*lightClient{alice, bob, carol} {
		c.CloseWithError(0, "")
	}
	for _, c := range r.host.Network().Conns() {
		c.Close()
	}
	eventually(t, "the relay sees that all left", func() bool {
		c := r.counters()
		return c.connections == 0 && c.circuits == 0 && c.reservations == 0
	})
	for _, name := range []string{"clients", "connections", "reservations", "circuits"} {
		delete(want, name)
	}
	texts += check(want)

	for who, c := range map[string]*lightClient{"alice": alice, "bob": bob, "carol": carol, "gone": gone} {
		for form, name := range idForms(c.id) {
			if strings.Contains(strings.ToLower(texts), strings.ToLower(name)) {
				t.Errorf("the metrics name %s as %s", who, form)
			}
		}
	}
	for _, secret := range []string{"127.0.0.1", "::1", "192.168.1.10", "/ip4/", "/ip6/", "12D3KooW", "secret", "crowd"} {
		if strings.Contains(texts, secret) {
			t.Errorf("the metrics contain %q", secret)
		}
	}
}

// idForms returns the ways in which a peer ID could be written.
func idForms(id peer.ID) map[string]string {
	return map[string]string{"base58": id.String(), "a CID": peer.ToCid(id).String(), "hex": fmt.Sprintf("%x", string(id)), "raw": string(id)}
}

// The limit per network applies in other code than the other limits.
func TestRefusalsPerNetworkAreCounted(t *testing.T) {
	r := newTestRelayWithin(t, limits{clients: 100, perNetwork: 3, testOnlyLimitLoopback: true}, defaultConfig(t), newTestKey(t))
	admits(t, r, 4)
	c := r.counters()
	if n := c.refused[refusedNetwork]; n < 1 || c.refused[refusedClient] != 0 {
		t.Errorf("refusals = %v, want some of %v", c.refused, refusedNetwork)
	}
	if r.registry != nil {
		t.Error("metrics are gathered although nobody asked for them")
	}
}

// Files under contrib are copied once and then forgotten, so each metric that they ask
// for must exist.
func TestContribAsksForMetricsThatExist(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--metrics=127.0.0.1:0"))
	_, text := scrape(t, r)
	name := regexp.MustCompile(`\b(privstack_relay|libp2p|process|go)_[a-z0-9_]+\b`)
	for _, path := range []string{"contrib/alerts.yml", "contrib/grafana-dashboard.json"} {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		names := name.FindAllString(string(data), -1)
		if len(names) == 0 {
			t.Errorf("%s asks for no metric", path)
		}
		for _, name := range names {
			if !strings.Contains(text, "\n# TYPE "+name+" ") {
				t.Errorf("%s asks for %s, which the relay does not have", path, name)
			}
		}
		if strings.HasSuffix(path, ".json") && !json.Valid(data) {
			t.Errorf("%s is not JSON", path)
		}
	}
}
