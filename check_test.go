package main

// What operators and monitors get from `privstack-relay check`, of relays that
// are well, ill, absent and hostile.

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
)

// What an operator may write for the relay to be checked.
func TestParseCheckTarget(t *testing.T) {
	const id = "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
	for s, want := range map[string]string{
		"relay.example.org":                               "relay.example.org http://relay.example.org:4002/api/v1/identity",
		"relay.example.org:8080":                          "relay.example.org http://relay.example.org:8080/api/v1/identity",
		"203.0.113.7":                                     "203.0.113.7 http://203.0.113.7:4002/api/v1/identity",
		"203.0.113.7:80":                                  "203.0.113.7 http://203.0.113.7:80/api/v1/identity",
		"2001:db8::7":                                     "2001:db8::7 http://[2001:db8::7]:4002/api/v1/identity",
		"[2001:db8::7]":                                   "2001:db8::7 http://[2001:db8::7]:4002/api/v1/identity",
		"[2001:db8::7]:80":                                "2001:db8::7 http://[2001:db8::7]:80/api/v1/identity",
		"https://relay.example.org":                       "relay.example.org https://relay.example.org:443/api/v1/identity",
		"http://relay.example.org/":                       "relay.example.org http://relay.example.org:80/api/v1/identity",
		"https://[2001:db8::7]:8443/r":                    "2001:db8::7 https://[2001:db8::7]:8443/r/api/v1/identity",
		"http://localhost:4002/api/v1/identity":           "localhost http://localhost:4002/api/v1/identity",
		"/ip4/203.0.113.7/udp/1/quic-v1/p2p/" + id:        "203.0.113.7 /ip4/203.0.113.7/udp/1/quic-v1 " + id,
		"/dns6/relay.example.org/udp/1/quic-v1/p2p/" + id: "relay.example.org /dns6/relay.example.org/udp/1/quic-v1 " + id,
	} {
		got, err := parseCheckTarget(s)
		text := fmt.Sprint(got.host, " ", got.url)
		if got.url == nil {
			text = fmt.Sprint(got.host, " ", got.addr, " ", got.id)
		}
		if err != nil || text != want {
			t.Errorf("parseCheckTarget(%q) = %s, %v, want %s", s, text, err, want)
		}
	}
	for _, s := range []string{
		"", " ", "-x", "a b", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0", "host:0", "host:70000", "host:x", ":4002", "[::1", "a/b",
		"ftp://relay.example.org", "https://", "https://u:p@relay.example.org", "https://relay.example.org/?q", "http://[::1", "http://%zz",
		"/ip4/203.0.113.7/udp/1/quic-v1", "/ip4/203.0.113.7/tcp/1/p2p/" + id, "/p2p/" + id, "/", "[/ip4/203.0.113.7/udp/1/quic-v1]",
	} {
		if got, err := parseCheckTarget(s); err == nil {
			t.Errorf("parseCheckTarget(%q) = %+v, want an error", s, got)
		}
	}
}

// checked is what one run of the binary said and how it ended.
type checked struct {
	checkReport
	code   int
	stdout string
	stderr string
}

// runCheckBinary runs `privstack-relay check args...` to its end.
func runCheckBinary(t *testing.T, args ...string) checked {
	t.Helper()
	cmd := command(t, append([]string{"check"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hung := time.AfterFunc(2*testTimeout, func() { cmd.Process.Kill() })
	cmd.Wait()
	if !hung.Stop() {
		t.Fatalf("check %q did not return within %v", args, 2*testTimeout)
	}
	if files, err := os.ReadDir(cmd.Dir); err != nil || len(files) > 0 {
		t.Errorf("check left %v behind (%v)", files, err)
	}
	return checked{code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String()}
}

// runCheckJSON runs it with --json.
func runCheckJSON(t *testing.T, target string) checked {
	t.Helper()
	c := runCheckBinary(t, "--json", target)
	dec := json.NewDecoder(strings.NewReader(c.stdout))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c.checkReport); err != nil || dec.More() {
		t.Fatalf("check --json %s = %q, %v, want one document; stderr %q", target, c.stdout, err, c.stderr)
	}
	if (c.code == 0) != c.OK || c.code > 1 {
		t.Errorf("exit status %d with ok = %v", c.code, c.OK)
	}
	return c
}

func (r checkReport) step(t *testing.T, name string) checkStep {
	t.Helper()
	for _, s := range r.Steps {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no step %s in %+v", name, r.Steps)
	return checkStep{}
}

// wantFailed checks that exactly these steps failed, and what the first says.
func (r checkReport) wantFailed(t *testing.T, says string, names ...string) {
	t.Helper()
	var failed []string
	for _, s := range r.Steps {
		if s.Result == checkFailed {
			failed = append(failed, s.Name)
			t.Logf("\n%s", s.text()) // -v shows what the README quotes
		}
	}
	if !slices.Equal(failed, names) {
		t.Errorf("failed: %v, want %v\n%s", failed, names, r.text())
	}
	if s := r.step(t, names[0]); !strings.Contains(s.text(), says) {
		t.Errorf("step says\n%swant %q in it", s.text(), says)
	}
}

func (r checkReport) text() (s string) {
	for _, step := range r.Steps {
		s += step.text()
	}
	return s
}

// checkSteps are the names that monitoring knows, in their order. Each is about
// the relay: what NAT the checker itself is behind is no step.
var checkSteps = []string{
	"name", "identity-ipv4", "identity-ipv6", "quic-ipv4", "quic-ipv6", "addresses", "identify",
	"observed", "clients", "dht", "record", "bridge", "reservation", "circuit",
}

// Whatever form the operator uses, a relay that is well is found to be.
func TestCheckPassesOnAGoodRelay(t *testing.T) {
	p := start(t)
	port := p.http[strings.LastIndex(p.http, ":")+1:]
	for _, tt := range []struct{ target, skipped string }{
		{"localhost:" + port, ""},
		{"127.0.0.1:" + port, "name identity-ipv6 quic-ipv6"},
		{"[::1]:" + port, "name identity-ipv4 quic-ipv4"},
		{p.http, ""},
		{p.bootstrap.Addrs[0].String() + "/p2p/" + p.peerID, "name identity-ipv4 identity-ipv6 quic-ipv6 addresses"},
	} {
		t.Run(tt.target, func(t *testing.T) {
			if strings.Contains(tt.target, "::1") && routeTo(netip.IPv6Loopback()) != "" {
				t.Skip("no IPv6 on this machine")
			}
			got := runCheckJSON(t, tt.target)
			if got.code != 0 || got.PeerID != p.peerID || got.Target != tt.target || got.stderr != "" {
				t.Errorf("exit status %d, stderr %q, peer %s of %s, want 0, nothing, and the relay's\n%s", got.code, got.stderr, got.PeerID, got.Target, got.text())
			}
			var names, skipped []string
			for _, s := range got.Steps {
				names = append(names, s.Name)
				if s.Result == checkSkipped {
					skipped = append(skipped, s.Name)
				}
			}
			if !slices.Equal(names, checkSteps) {
				t.Errorf("steps = %v, want %v", names, checkSteps)
			}
			// Whether localhost has an IPv6 address is the machine's business.
			if tt.skipped != "" && strings.Join(skipped, " ") != tt.skipped {
				t.Errorf("skipped %v, want %s", skipped, tt.skipped)
			}
			for _, name := range []string{"bridge", "circuit"} {
				if n, ok := got.step(t, name).Values["mib_per_s"].(float64); !ok || n <= 0 {
					t.Errorf("%s = %+v, want mib_per_s", name, got.step(t, name))
				}
			}
		})
	}
}

// A monitor that checks every minute is no burden: two clients that come and go.
// (runCheckBinary sees to it that no file stays.)
func TestCheckLeavesNothingBehind(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	for range 2 {
		if got := runCheckJSON(t, r.info.Addrs[0].String()+"/p2p/"+r.peerID()); !got.OK {
			t.Errorf("failed:\n%s", got.text())
		}
	}
	eventually(t, "the clients are gone", func() bool { return len(r.host.Network().Conns()) == 0 })
	if got := r.counters(); got.peersServed != 4 || got.bridged != 2 || got.relayedConnections != 4 {
		t.Errorf("counters = %+v, want 4 peers served, and for each pair a bridge and a circuit", got)
	}
}

// A client that can't connect leaves no socket and no goroutine.
func TestCheckClientThatFailsLeavesNothingBehind(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 20 {
		ctx, cancel := context.WithCancel(testContext(t))
		cancel()
		if c, err := dialCheckClient(ctx, ma.StringCast("/ip4/127.0.0.1/udp/1/quic-v1"), ""); err == nil {
			c.close()
			t.Fatal("connected to a port where nothing listens, after the time was over")
		}
	}
	eventually(t, "its goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
}

// A relay whose clock is wrong serves the deployed clients, whose certificates have
// always been valid. So the check's are, too.
func TestCheckClientIsValidAtAnyTime(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c, err := dialCheckClient(testContext(t), r.info.Addrs[0], r.info.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	var conn *quic.Conn
	eventually(t, "it is connected", func() bool {
		conns := r.host.Network().ConnsToPeer(c.id)
		return len(conns) == 1 && conns[0].As(&conn)
	})
	if from := conn.ConnectionState().TLS.PeerCertificates[0].NotBefore; from.Year() != 1975 {
		t.Errorf("its certificate is valid from %v, want 1975", from)
	}
}

// A terminal of 100 columns, no colour needed, and one line or more for each step.
func TestCheckTextIsReadable(t *testing.T) {
	p := start(t)
	got := runCheckBinary(t, p.http)
	if got.code != 0 || got.stderr != "" || !strings.HasSuffix(got.stdout, "\nAll is well.\n") {
		t.Errorf("exit status %d, stdout\n%s\nstderr %q, want 0 and a good end", got.code, got.stdout, got.stderr)
	}
	for _, name := range checkSteps {
		if !strings.Contains(got.stdout, "\n✓ "+name) && !strings.Contains(got.stdout, "\n– "+name) {
			t.Errorf("no line for %s", name)
		}
	}
	wantReadable(t, got.stdout)
}

func wantReadable(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if utf8.RuneCountInString(line) > 100 || clean(line) != line {
			t.Errorf("line %q has more than 100 columns, or characters that a terminal acts on", line)
		}
	}
}

// Scripts tell a mistyped command from a relay that is ill.
func TestCheckExitStatusOfUsage(t *testing.T) {
	if got := runCheckBinary(t, "--help"); got.code != 0 || got.stdout != checkUsage {
		t.Errorf("check --help = %d, %q, want 0 and its usage", got.code, got.stdout)
	}
	for _, args := range [][]string{nil, {""}, {"a", "b"}, {"--nonsense", "a"}, {"a", "--nonsense"}, {"https://"}, {"/ip4/203.0.113.7/udp/1/quic-v1"}} {
		if got := runCheckBinary(t, args...); got.code != 2 || got.stdout != "" || !strings.Contains(got.stderr, "check") {
			t.Errorf("check %q = %d, stdout %q, stderr %q, want 2 and a reason", args, got.code, got.stdout, got.stderr)
		}
	}
}

// fakeEndpoint answers every request with body, and says where it is.
func fakeEndpoint(t *testing.T, body string) (hostPort string) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }))
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String()
}

func identityBody(t *testing.T, id peer.ID, addrs ...string) string {
	t.Helper()
	body, err := json.Marshal(identityResponse{PeerID: id.String(), Addresses: addrs})
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// silentUDP is a port on which packets come in and nothing goes out, as behind a
// firewall that drops them.
func silentUDP(t *testing.T) (port int) {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.LocalAddr().(*net.UDPAddr).Port
}

// The mistake that operators make most: the identity endpoint answers, and UDP
// was forgotten.
func TestCheckFindsUDPClosed(t *testing.T) {
	t.Parallel()
	id, _ := peer.Decode("12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV")
	port := silentUDP(t)
	got := runCheckJSON(t, fakeEndpoint(t, identityBody(t, id, fmt.Sprintf("/ip4/0.0.0.0/udp/%d/quic-v1", port))))
	got.wantFailed(t, "no answer", "quic-ipv4", "addresses")
	if s := got.step(t, "quic-ipv4"); !slices.Contains(s.Try, fmt.Sprintf("ufw allow %d/udp", port)) {
		t.Errorf("try = %q, want the ufw line for UDP %d", s.Try, port)
	}
	for _, s := range got.Steps[6:] {
		if s.Result != checkSkipped || s.Detail != "needs an address that answers" {
			t.Errorf("step %+v, want it skipped: nothing answers by QUIC", s)
		}
	}
}

// The relay has died, or was never started. (Whether anything answers on the
// default UDP port of this machine is not this test's business.)
func TestCheckFindsRelayStopped(t *testing.T) {
	t.Parallel()
	p := start(t)
	p.Process.Kill()
	p.Wait()
	got := runCheckJSON(t, p.http)
	s := got.step(t, "identity-ipv4")
	if got.OK || s.Result != checkFailed || !slices.Contains(s.Try, tryStatus) {
		t.Errorf("got\n%swant the first step to say that nothing listens", got.text())
	}
	wantReadable(t, got.text())
}

// A relay behind a proxy can be down in two ways, and the operator is sent to the one that
// is.
func TestCheckTellsTheProxyFromTheRelay(t *testing.T) {
	for _, status := range []int{502, 503, 504} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		defer srv.Close()
		got := runCheckJSON(t, srv.URL).step(t, "identity-ipv4")
		if got.Result != checkFailed || !strings.Contains(got.Cause, "does not reach the relay behind it") {
			t.Errorf("with status %d: %+v, want the relay behind the proxy named", status, got)
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close() // nobody listens there now
	got := runCheckJSON(t, "https://"+ln.Addr().String()).step(t, "identity-ipv4")
	if got.Result != checkFailed || !strings.Contains(got.Cause, "the reverse proxy is not running") {
		t.Errorf("without a proxy: %+v, want it named", got)
	}
}

// Whoever counts the lines finds each address that the relay lists.
func TestCheckShowsEachListedAddress(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	good := r.info.Addrs[0].String()
	all := strings.Replace(good, "127.0.0.1", "0.0.0.0", 1)
	got := runCheckJSON(t, fakeEndpoint(t, identityBody(t, r.info.ID, good, "/ip4/127.0.0.1/tcp/1", good, all, "\u202enonsense")))
	want := []string{
		"✓ " + good, "– /ip4/127.0.0.1/tcp/1  not QUIC", "– " + good + "  listed twice", "– " + all + "  stands for " + good, "– ?nonsense  not QUIC",
	}
	s := got.step(t, "addresses")
	if !got.OK || s.Detail != "5 listed, 1 answer" || !slices.EqualFunc(s.Lines, want, strings.HasPrefix) {
		t.Errorf("addresses = %+v, want a line for each:\n%s", s, strings.Join(want, "\n"))
	}
}

// A monitor shows these texts in terminals and on pages.
func TestCheckReportIsHarmlessInEveryField(t *testing.T) {
	const bad = "a\x1b[2J\u202eb\u2066c\x00\r\n\u0085"
	s := stepFailed(diagnosis{bad, []string{bad}}, "%s", bad).with(map[string]any{"text": bad, "texts": []string{bad}, "none": []string{}, "n": 7})
	s.Lines = []string{bad}
	text, err := json.Marshal(s.cleaned())
	if err != nil {
		t.Fatal(err)
	}
	const want = "a?[2J?b?c????"
	if n := strings.Count(string(text), `"`+want+`"`); n != 6 || !strings.Contains(string(text), `"n":7,"none":[],`) {
		t.Errorf("%d of 6 fields are %q:\n%s", n, want, text)
	}
	target, err := parseCheckTarget("https://relay.example.org/\u202e")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	report, err := json.Marshal(checkRelay(ctx, target, func(checkStep) {}))
	if err != nil || strings.ContainsRune(string(report), '\u202e') {
		t.Errorf("report %s, %v, want nothing that runs from right to left", report, err)
	}
}

// Another key file than the one clients know.
func TestCheckFindsAnotherPeerID(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	other := "/p2p/12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
	got := runCheckJSON(t, r.info.Addrs[0].String()+other)
	got.wantFailed(t, "promised", "quic-ipv4")
	if s := got.step(t, "quic-ipv4"); !strings.Contains(s.Detail, r.peerID()) || !strings.Contains(s.Cause, "key") {
		t.Errorf("step %+v, want the ID that was found, and the key file as the cause", s)
	}
}

// Each announced address that fails is named. One of the host that was asked may
// fail where others are announced: the endpoint may be behind a proxy.
func TestCheckDialsWhatIsAnnounced(t *testing.T) {
	t.Parallel()
	r := newTestRelay(t, defaultConfig(t))
	good := r.info.Addrs[0].String()
	closed := fmt.Sprintf("/ip4/127.0.0.2/udp/%d/quic-v1", silentUDP(t))
	port := silentUDP(t)
	got := runCheckJSON(t, fakeEndpoint(t, identityBody(t, r.info.ID, closed, good, fmt.Sprintf("/ip4/0.0.0.0/udp/%d/quic-v1", port))))
	got.wantFailed(t, "✗ "+closed, "addresses")
	lines := got.step(t, "addresses").Lines
	if want := fmt.Sprintf("– /ip4/127.0.0.1/udp/%d/quic-v1  no answer; the relay announces other addresses", port); !slices.Contains(lines, want) {
		t.Errorf("addresses: %q, want %q among them", lines, want)
	}
	if s := got.step(t, "quic-ipv4"); s.Values["address"] != good {
		t.Errorf("quic-ipv4 = %+v, want the address that answers", s)
	}
}

// Behind the endpoint's address may be anything, and it may do anything.
func TestCheckSurvivesHostileEndpoints(t *testing.T) {
	id, _ := peer.Decode("12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV")
	var thousands []string
	for i := range 4000 {
		thousands = append(thousands, fmt.Sprintf("/ip4/127.0.0.1/udp/%d/quic-v1", 1+i))
	}
	drip := func(c net.Conn) { // a header line that never ends, byte by byte
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
		for range time.Tick(50 * time.Millisecond) {
			if _, err := io.WriteString(c, " "); err != nil {
				return
			}
		}
	}
	flood := func(c net.Conn) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		for junk := bytes.Repeat([]byte("x"), 1<<16); ; {
			if _, err := c.Write(junk); err != nil {
				return
			}
		}
	}
	say := func(s string) func(net.Conn) {
		return func(c net.Conn) {
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(s), s)
		}
	}
	for _, tt := range []struct {
		name  string
		serve func(net.Conn)
		says  string
	}{
		{"says nothing", func(c net.Conn) { io.Copy(io.Discard, c) }, "does not answer in time"},
		{"answers byte by byte", drip, "does not answer in time"},
		{"never stops answering", flood, "longer than 65536 bytes"},
		{"speaks another protocol", func(c net.Conn) { io.WriteString(c, "220 mail.example.org ESMTP\x1b[2J\r\n") }, "malformed HTTP"},
		{"garbage", say(`{"peer_id":`), "not a relay's identity"},
		{"JSON of another kind", say(`[1,2,3]`), "not a relay's identity"},
		{"no peer ID", say(`{"peer_id":"\u001b[2J` + strings.Repeat("x", 3000) + `"}`), "peer_id"},
		{"redirects away", func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2/\r\nContent-Length: 0\r\n\r\n")
		}, "redirected to http://127.0.0.2/"},
		{"redirects in a circle", func(c net.Conn) {
			fmt.Fprintf(c, "HTTP/1.1 302 Found\r\nLocation: http://%s/\r\nContent-Length: 0\r\n\r\n", c.LocalAddr())
		}, "redirected"},
		{"error", func(c net.Conn) { io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n") }, "HTTP status 502"},
		{"thousands of addresses", say(identityBody(t, id, thousands...)), "longer than 65536 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			target, err := parseCheckTarget(rawEndpoint(t, tt.serve))
			if err != nil {
				t.Fatal(err)
			}
			limit := testTimeout
			if strings.Contains(tt.says, "in time") { // and then the shorter the better
				limit = time.Second
			}
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			var a endpointAnswer
			a.ask(ctx, target.url, netip.MustParseAddr("127.0.0.1"))
			if a.err == nil || !strings.Contains(a.err.Error(), tt.says) || a.why.Cause == "" {
				t.Errorf("error = %v (likely %q), want %q", a.err, a.why.Cause, tt.says)
			}
		})
	}
}

// The identity endpoint behind a reverse proxy with TLS, below a path of its own.
func TestCheckThroughReverseProxy(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("how to trust a certificate by environment is known for Linux")
	}
	r := newTestRelay(t, defaultConfig(t))
	api := newAPIHandler(func() identityResponse { return identityResponse{PeerID: r.peerID(), Addresses: r.listedAddrs()} })
	srv := httptest.NewTLSServer(http.StripPrefix("/relay", api))
	defer srv.Close()
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", roots)
	if got := runCheckJSON(t, srv.URL+"/relay/"); !got.OK || got.step(t, "identity-ipv4").Result != checkPassed {
		t.Errorf("failed:\n%s", got.text())
	}
	if got := runCheckJSON(t, srv.URL); got.step(t, "identity-ipv4").Detail != strings.TrimPrefix(srv.URL, "https://")+": HTTP status 404" {
		t.Errorf("without its path:\n%s", got.text())
	}
}

// What is wrong between an operator and the identity endpoint is told by the kind of
// the error: its text is another one on each system.
func TestCheckExplainsEndpointErrors(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	badCertificate := httptest.NewUnstartedServer(http.NotFoundHandler())
	badCertificate.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	badCertificate.StartTLS()
	t.Cleanup(badCertificate.Close)
	noSuchName := rawEndpoint(t, func(c net.Conn) {
		c.Write([]byte{21, 3, 3, 0, 2, 2, 112}) // a TLS alert: fatal, unrecognized_name
	})
	for _, tt := range []struct{ name, target, cause string }{
		{"nothing listens", closed.Addr().String(), "nothing listens on TCP"},
		{"certificate that clients refuse", badCertificate.URL, "certificate"},
		{"proxy that does not know the name", "https://" + noSuchName, "certificate"},
		{"HTTP where HTTPS was asked for", "https://" + fakeEndpoint(t, "{}"), "write http://"},
		{"another program", fakeEndpoint(t, "{}"), "another program answers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			target, err := parseCheckTarget(tt.target)
			if err != nil {
				t.Fatal(err)
			}
			var a endpointAnswer
			a.ask(testContext(t), target.url, netip.MustParseAddr("127.0.0.1"))
			if a.err == nil || !strings.Contains(a.why.Cause, tt.cause) {
				t.Errorf("error = %v (likely %q), want the cause to say %q", a.err, a.why.Cause, tt.cause)
			}
		})
	}
}

// A server that hangs does not hang the check.
func TestCheckSurvivesHungEndpoint(t *testing.T) {
	t.Parallel()
	got := runCheckJSON(t, rawEndpoint(t, func(c net.Conn) { io.Copy(io.Discard, c) }))
	if s := got.step(t, "identity-ipv4"); s.Result != checkFailed || !strings.Contains(s.Detail, "does not answer in time") {
		t.Errorf("identity-ipv4 = %+v, want it to say that there is no answer", s)
	}
	wantReadable(t, got.text())
}

// rawEndpoint takes connections on loopback and hands each to serve once a
// request has begun.
func rawEndpoint(t *testing.T, serve func(net.Conn)) (hostPort string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() { // until the listener is closed
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.CopyN(io.Discard, c, 1)
				serve(c)
			}()
		}
	}()
	return ln.Addr().String()
}

// A relay that says many addresses, or others' addresses, makes nobody a port
// scanner.
func TestCheckDialsFewAddresses(t *testing.T) {
	var many []string
	for i := range 500 {
		many = append(many, fmt.Sprintf("/ip4/203.0.113.%d/udp/%d/quic-v1", i%250+1, i+1))
	}
	for _, tt := range []struct {
		name    string
		asked   string
		listed  []string
		dialled string
	}{
		{"wildcards stand for the host that was asked", "203.0.113.7", []string{"/ip4/0.0.0.0/udp/1/quic-v1", "/ip6/::/udp/1/quic-v1"}, "[/ip4/203.0.113.7/udp/1/quic-v1]"},
		{"local addresses are not dialled from outside", "203.0.113.7", []string{"/ip4/127.0.0.1/udp/1/quic-v1", "/ip4/10.1.2.3/udp/1/quic-v1", "/ip6/::ffff:10.1.2.3/udp/1/quic-v1", "/ip4/100.64.0.1/udp/1/quic-v1", "/ip4/224.0.0.1/udp/1/quic-v1", "/ip4/255.255.255.255/udp/1/quic-v1", "/ip6/fe80::1/udp/1/quic-v1"}, "[]"},
		{"but they are in their own network", "192.168.1.2", []string{"/ip4/127.0.0.1/udp/1/quic-v1", "/ip4/10.1.2.3/udp/1/quic-v1"}, "[/ip4/10.1.2.3/udp/1/quic-v1]"},
		{"other transports are not", "203.0.113.7", []string{"/ip4/203.0.113.7/tcp/1", "/ip4/203.0.113.7/tcp/1/quic-v1", "/dns/localhost/tcp/1/quic-v1", "/ip4/203.0.113.7/udp/1/quic-v1/webtransport", "junk", "", "/ip4/203.0.113.7/udp/1/quic-v1/p2p-circuit"}, "[]"},
		{"none twice", "203.0.113.7", []string{"/ip4/203.0.113.7/udp/1/quic-v1", "/ip4/0.0.0.0/udp/1/quic-v1"}, "[/ip4/203.0.113.7/udp/1/quic-v1]"},
		{"not too many", "203.0.113.7", many, fmt.Sprint(many[:maxCheckDials])},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if routeTo(netip.MustParseAddr(tt.asked)) != "" {
				t.Skip("no network on this machine, not even one that leads nowhere")
			}
			target, err := parseCheckTarget(tt.asked)
			if err != nil {
				t.Fatal(err)
			}
			ips := map[string][]netip.Addr{ipv4: {netip.MustParseAddr(tt.asked)}}
			c := &dialCheck{endpoint: &endpointCheck{checkTarget: target, ips: ips, listed: tt.listed}}
			var dialled []string
			for _, d := range c.addrs(testContext(t)) {
				if d.result == "" {
					dialled = append(dialled, d.addr.String())
				}
			}
			if fmt.Sprint(dialled) != tt.dialled {
				t.Errorf("dials %v, want %s", dialled, tt.dialled)
			}
		})
	}
}

// A relay that is full says so, and the check says which flags are meant.
func TestCheckFindsRelayFull(t *testing.T) {
	for _, tt := range []struct {
		clients int
		failed  []string
	}{
		{1, []string{"quic-ipv4"}},
		{2, []string{"clients"}},
	} {
		t.Run(fmt.Sprint(tt.clients), func(t *testing.T) {
			r := newTestRelayWithin(t, limits{clients: tt.clients, perNetwork: 256}, defaultConfig(t), newTestKey(t))
			connect(t, newClient(t), r)
			got := runCheckJSON(t, r.info.Addrs[0].String()+"/p2p/"+r.peerID())
			got.wantFailed(t, "--max-clients", tt.failed...)
		})
	}
}

// A node that is no relay, and one that takes every request and never answers.
func TestCheckSurvivesHungRelay(t *testing.T) {
	t.Parallel()
	hang := func(s network.Stream) { io.Copy(io.Discard, s) }
	for _, tt := range []struct {
		name   string
		serve  []protocol.ID
		says   string
		failed []string
	}{
		{"no relay", nil, "not a PrivStack relay", []string{"identify", "dht", "record", "reservation"}},
		{"hangs", []protocol.ID{"/ipfs/id/1.0.0", kadProtocol, proto.ProtoIDv2Hop}, "hangs", []string{"identify", "observed", "dht", "record", "reservation"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := newClient(t, libp2p.UserAgent("evil\x1b[2J"))
			for _, id := range tt.serve {
				h.SetStreamHandler(id, hang)
			}
			got := runCheckJSON(t, h.Addrs()[0].String()+"/p2p/"+h.ID().String())
			got.wantFailed(t, tt.says, tt.failed...)
			wantReadable(t, got.text())
		})
	}
}

// A node that answers everything with nonsense, in messages that can be read.
func TestCheckSurvivesNonsense(t *testing.T) {
	h := newClient(t)
	h.SetStreamHandler(kadProtocol, func(s network.Stream) {
		defer s.Close()
		resp := &kadpb.Message{Record: &recpb.Record{}, CloserPeers: []*kadpb.Message_Peer{{}}}
		for range 500 {
			resp.CloserPeers = append(resp.CloserPeers, &kadpb.Message_Peer{Id: []byte("\x1b[2J"), Addrs: [][]byte{{}, {0xff}, nil}})
		}
		protodelim.MarshalTo(s, resp)
	})
	h.SetStreamHandler(proto.ProtoIDv2Hop, func(s network.Stream) {
		defer s.Close()
		protodelim.MarshalTo(s, &circuitpb.HopMessage{
			Type: circuitpb.HopMessage_STATUS.Enum(), Status: circuitpb.Status_OK.Enum(),
			Reservation: &circuitpb.Reservation{
				Expire: new(uint64(1 << 40)),
				Addrs:  slices.Repeat([][]byte{{}, {0xff}, nil, ma.StringCast("/ip4/10.0.0.1").Bytes(), ma.StringCast("/p2p-circuit").Bytes()}, 100),
			},
		})
	})
	got := runCheckJSON(t, h.Addrs()[0].String()+"/p2p/"+h.ID().String())
	got.wantFailed(t, "not a PrivStack relay", "identify", "dht", "record", "circuit")
	wantReadable(t, got.text())
}

// A message of which half can be read is none: what it would fill in is not the
// relay's word.
func TestCheckDropsHalfMessages(t *testing.T) {
	half := []byte{4, 0x32, 1, 'x', 0xff} // length, agent_version of identify = "x", and a broken tag
	h := newClient(t)
	for _, id := range []protocol.ID{"/ipfs/id/1.0.0", kadProtocol, proto.ProtoIDv2Hop} {
		h.SetStreamHandler(id, func(s network.Stream) {
			defer s.Close()
			s.Write(half)
		})
	}
	got := runCheckJSON(t, h.Addrs()[0].String()+"/p2p/"+h.ID().String())
	got.wantFailed(t, "", "identify", "observed", "dht", "record", "reservation")
	if s := got.step(t, "identify"); fmt.Sprint(s.Values) != "map[agent_version: protocol_version:]" {
		t.Errorf("identify = %+v, want nothing of the half message", s)
	}
}

// What a circuit carries is the operator's to choose; a sync that is cut is not
// what they wanted.
func TestCheckFindsSmallCircuits(t *testing.T) {
	t.Parallel()
	r := newTestRelay(t, defaultConfig(t, "--circuit-bytes=128KiB"))
	got := runCheckJSON(t, r.info.Addrs[0].String()+"/p2p/"+r.peerID())
	got.wantFailed(t, "--circuit-bytes", "bridge", "circuit")
}

// The longest duration of a circuit is reported as it is, also where an int has 32 bits.
func TestCheckReportsLongDurations(t *testing.T) {
	cfg := defaultConfig(t)
	cfg.circuitDuration = maxCircuitDuration
	r := newTestRelay(t, cfg)
	s := runCheckJSON(t, r.info.Addrs[0].String()+"/p2p/"+r.peerID()).step(t, "reservation")
	if got := s.Values["duration_s"]; got != float64(math.MaxUint32) {
		t.Errorf("duration_s = %v, want %d", got, uint32(math.MaxUint32))
	}
}

// The relay that an operator forgot to update: nobody behind a NAT would notice but the
// devices that never meet.
func TestCheckFindsRelayWithoutBridge(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	r.bridge.drain()
	got := runCheckJSON(t, r.info.Addrs[0].String()+"/p2p/"+r.peerID())
	got.wantFailed(t, "the relay is too old", "bridge")
	wantReadable(t, got.text())
}

// What stands in front of a relay may hide what the bridge needs to see: that a device
// dials another from the socket with which it is connected to the relay.
func TestCheckFindsPortsRewritten(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	got := runCheckJSON(t, portPerConnection(t, r.info.Addrs[0]).String()+"/p2p/"+r.peerID())
	got.wantFailed(t, "the relay answers, and not the other client", "bridge")
}

// portPerConnection forwards packets to the relay at addr from a port for each QUIC
// connection, as some load balancers do, and says where they are to be sent.
func portPerConnection(t *testing.T, addr ma.Multiaddr) ma.Multiaddr {
	t.Helper()
	to, _, err := quicreuse.FromQuicMultiaddr(addr)
	if err != nil {
		t.Fatal(err)
	}
	front, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	ended.Go(func() {
		ports := make(map[string]*net.UDPConn) // by client and its connection ID
		newest := make(map[netip.AddrPort]*net.UDPConn)
		defer func() {
			for _, back := range ports {
				back.Close()
			}
		}()
		buffer := make([]byte, 1<<16)
		for {
			n, client, err := front.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			if isLong(buffer[:n]) {
				_, source, _ := longIDs(buffer[:n])
				key := client.String() + string(source)
				if ports[key] == nil {
					back, err := net.DialUDP("udp4", nil, to)
					if err != nil {
						return
					}
					ports[key] = back
					ended.Go(func() {
						buffer := make([]byte, 1<<16)
						for n, err := back.Read(buffer); err == nil; n, err = back.Read(buffer) {
							front.WriteToUDPAddrPort(buffer[:n], client)
						}
					})
				}
				newest[client] = ports[key]
			}
			if back := newest[client]; back != nil {
				back.Write(buffer[:n])
			}
		}
	})
	t.Cleanup(func() {
		front.Close()
		ended.Wait()
	})
	at, err := quicreuse.ToQuicMultiaddr(front.LocalAddr(), quic.Version1)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// An operator who checks through a port that a container engine forwards from loopback
// has no fault to find: no device comes that way.
func TestCheckSkipsBridgeOverForwardedLoopback(t *testing.T) {
	c := &meetCheck{
		dials:    &dialCheck{used: &dialled{addr: ma.StringCast("/ip4/127.0.0.1/udp/4001/quic-v1")}},
		identity: identifypb.Identify{ObservedAddr: ma.StringCast("/ip4/172.17.0.1/udp/5001/quic-v1").Bytes()},
		key:      newGroupKey(),
	}
	if s := c.bridge(testContext(t)); s.Result != checkSkipped || s.Detail == "" {
		t.Errorf("bridge = %+v, want it skipped, with a reason", s)
	}
}

// The check is of the relay from here: an operator who gives up is obeyed.
func TestCheckEndsWhenInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(testContext(t))
	target, err := parseCheckTarget("127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	r := checkRelay(ctx, target, func(s checkStep) {
		if s.Name == "name" {
			cancel()
		}
	})
	if last := r.Steps[len(r.Steps)-1]; r.OK || last.Result != checkFailed || !strings.Contains(last.Detail, "interrupted") {
		t.Errorf("checkRelay = %+v, want the steps after the first not reached", r)
	}
}

// check is the report of a check that is run in ns.
func (l *lab) check(ns, target string) (r checkReport) {
	l.t.Helper()
	cmd := command(l.t, "check", "--json", target)
	cmd.Args = append([]string{"ip", "netns", "exec", ns}, cmd.Args...)
	cmd.Path, _ = exec.LookPath("ip")
	out, err := cmd.Output()
	if err := json.Unmarshal(out, &r); err != nil {
		l.t.Fatalf("check: %v\n%s", err, out)
	}
	if (err == nil) != r.OK {
		l.t.Errorf("exit: %v, with ok = %v", err, r.OK)
	}
	return r
}

// An operator may check from home. What kind of NAT that home has is not the
// relay's fault, so no step fails or is skipped for it.
func TestCheckBehindNAT(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		kind natKind
	}{
		{"port kept", endpointIndependent},
		{"another port for each destination", endpointDependent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.relay(l.public("relay", "11.0.0.1/8"), nil, "--announce=11.0.0.1")
			got := l.check(l.home("home", l.router("router", "11.2.0.1/8", tt.kind), 10), "11.0.0.1")
			if !got.OK {
				t.Errorf("failed:\n%s", got.text())
			}
			if s := got.step(t, "observed"); !strings.HasPrefix(fmt.Sprint(s.Values["address"]), "11.2.0.1:") {
				t.Errorf("observed %+v, want the router's address", s)
			}
			for _, name := range []string{"bridge", "circuit"} {
				if s := got.step(t, name); s.Result != checkPassed {
					t.Errorf("%s = %+v, want it passed", name, s)
				}
			}
		})
	}
}

// An operator may check from the relay's own machine, or from beside it.
func TestCheckFromNearby(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	cloud := l.router("cloud", "11.0.0.1/8", endpointIndependent)
	// With hairpinning, so that its own network reaches the public address, too.
	l.nft(cloud, `table ip cloud {
		chain arriving { type nat hook prerouting priority dstnat; ip daddr 11.0.0.1 dnat to 192.168.1.10; }
		chain hairpin { type nat hook postrouting priority srcnat; iifname "br0" oifname "br0" masquerade; }
	}`)
	relay, beside := l.home("relay", cloud, 10), l.home("beside", cloud, 11)
	l.relay(relay, nil)
	for _, tt := range []struct{ from, target string }{
		{relay, "127.0.0.1"}, {relay, "192.168.1.10"}, {beside, "192.168.1.10"}, {beside, "11.0.0.1"},
	} {
		got := l.check(tt.from, tt.target)
		if s := got.step(t, "bridge"); s.Result != checkPassed {
			t.Errorf("from %s, %s:\n%s", tt.from, tt.target, got.text())
		}
	}
}

// The mistakes that only show from outside, on an internet of our own.
func TestCheckFindsDeploymentMistakes(t *testing.T) {
	t.Parallel()
	t.Run("firewall without UDP", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		ns := l.public("relay", "11.0.0.1/8")
		l.relay(ns, nil)
		l.nft(ns, `table ip fw { chain in { type filter hook input priority filter; policy drop; tcp dport 4002 accept; }
}`)
		got := l.check(l.public("me", "11.0.0.9/8"), "11.0.0.1")
		got.wantFailed(t, "try: ufw allow 4001/udp", "quic-ipv4", "addresses")
	})
	t.Run("firewall without TCP", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		ns := l.public("relay", "11.0.0.1/8")
		id := l.relay(ns, nil).ID
		l.nft(ns, `table ip fw { chain in { type filter hook input priority filter; policy drop; udp dport 4001 accept; }
}`)
		got := l.check(l.public("me", "11.0.0.9/8"), "11.0.0.1")
		got.wantFailed(t, "try: ufw allow 4002/tcp", "identity-ipv4")
		if got.PeerID != id.String() {
			t.Errorf("peer ID %s, want it found over QUIC: %s", got.PeerID, id)
		}
	})
	t.Run("NAT and nothing announced", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		cloud := l.router("cloud", "11.0.0.1/8", endpointIndependent)
		l.nft(cloud, `table ip cloud { chain arriving { type nat hook prerouting priority dstnat; iifname "wan" ip daddr 11.0.0.1 dnat to 192.168.1.10; }
}`)
		l.relay(l.home("relay", cloud, 10), nil)
		got := l.check(l.public("me", "11.0.0.9/8"), "11.0.0.1")
		got.wantFailed(t, "--announce 11.0.0.1", "reservation")
	})
	t.Run("port forward that hides clients", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		cloud := l.router("cloud", "11.0.0.1/8", endpointIndependent)
		l.nft(cloud, `table ip cloud {
			chain arriving { type nat hook prerouting priority dstnat; iifname "wan" ip daddr 11.0.0.1 dnat to 192.168.1.10; }
			chain hiding { type nat hook postrouting priority srcnat; oifname "br0" masquerade; }
		}`)
		l.relay(l.home("relay", cloud, 10), nil, "--announce=11.0.0.1")
		got := l.check(l.public("me", "11.0.0.9/8"), "11.0.0.1")
		got.wantFailed(t, "hides where clients are", "observed")
	})
	t.Run("check without DNS", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		got := l.check(l.public("me", "11.0.0.9/8"), "relay.example.org")
		got.wantFailed(t, "this machine is offline, or its DNS server does not answer", "name")
	})
	t.Run("private address announced", func(t *testing.T) {
		t.Parallel()
		l := newLab(t)
		l.relay(l.public("relay", "11.0.0.1/8"), nil, "--announce=11.0.0.1", "--announce=192.168.1.10")
		got := l.check(l.public("me", "11.0.0.9/8"), "11.0.0.1")
		got.wantFailed(t, "✗ /ip4/192.168.1.10/udp/4001/quic-v1", "addresses")
	})
}

// Whatever the other side says, it fits the terminal and does nothing to it.
func FuzzCheckText(f *testing.F) {
	f.Add("relay.example.org:1", "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV \x1b[2J\r\nno")
	f.Add("/ip4/203.0.113.7/udp/1/quic-v1/p2p/12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV", "\xff\xfe 世界")
	f.Add("http://[::1]/a/../b", "")
	f.Fuzz(func(t *testing.T, target, said string) {
		s := stepFailed(likely("a cause"), "%s", clean(said))
		wantReadable(t, s.text())
		if got, err := parseCheckTarget(target); err == nil {
			if got.host == "" || (got.url == nil) == (got.addr == nil) || got.addr != nil && (got.id == "" || len(got.addr) != 3) {
				t.Errorf("parseCheckTarget(%q) = %+v", target, got)
			}
		}
	})
}
