//go:build interop

package main

// The relay with the clients' own stack: the rust-libp2p program in interop/,
// which behaves as the deployed clients do. It needs cargo; run with
//
//	go test -tags interop -run Rust .

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/proto"
)

// buildRust compiles the client once.
var buildRust = sync.OnceValues(func() (string, error) { return cargoBuild("release", "interop") })

// cargoBuild compiles a program of interop/ and returns its path. Its target directory is
// outside of the checkout, so that the next run is quick.
func cargoBuild(profile, name string) (string, error) {
	target := os.Getenv("CARGO_TARGET_DIR")
	if target == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		target = filepath.Join(cache, "privstack-relay-interop")
	}
	cmd := exec.Command("cargo", "build", "--profile", profile, "--bin", name, "--locked", "--target-dir", target)
	cmd.Dir = "interop"
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cargo build: %w\n%s", err, out)
	}
	return filepath.Join(target, profile, name), nil
}

// rustClient is a running client.
type rustClient struct {
	t     testing.TB
	id    string
	began time.Time
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when it has ended and its events are complete

	mu     sync.Mutex
	events []rustEvent
	more   chan struct{} // closed with the next event
}

// rustEvent is a line of the client's output; the fields vary with the event.
type rustEvent map[string]any

func (e rustEvent) str(key string) string { s, _ := e[key].(string); return s }

// is reports whether e is such an event, with those string fields.
func (e rustEvent) is(event string, fields ...string) bool {
	for i := 0; i < len(fields); i += 2 {
		if e.str(fields[i]) != fields[i+1] {
			return false
		}
	}
	return e.str("event") == event
}

// startRust runs a client that knows the relay and a sync code. It ticks every
// second instead of every 30.
func startRust(t testing.TB, relay peer.AddrInfo, code string, args ...string) *rustClient {
	t.Helper()
	args = append([]string{"tick_ms=1000"}, args...)
	if !slices.Contains(args, "listen=none") {
		args = append(args, "listen=/ip4/127.0.0.1/udp/0/quic-v1")
	}
	return startRustBy(t, nil, relay, code, args...)
}

// startRustBy is startRust as a client's defaults are, by way of a command that
// runs others.
func startRustBy(t testing.TB, by []string, relay peer.AddrInfo, code string, args ...string) *rustClient {
	t.Helper()
	name, err := buildRust()
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("%s/p2p/%s", relay.Addrs[0], relay.ID)
	words := slices.Concat(by, []string{name, "relay=" + addr, "code=" + code}, args)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stderr = os.Stderr
	c := &rustClient{t: t, began: time.Now(), cmd: cmd, done: make(chan struct{}), more: make(chan struct{})}
	if c.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.done)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var e rustEvent
			if json.Unmarshal(lines.Bytes(), &e) == nil {
				e["after"] = time.Since(c.began)
				c.mu.Lock()
				c.events = append(c.events, e)
				close(c.more)
				c.more = make(chan struct{})
				c.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() {
		c.kill()
		if t.Failed() {
			for _, e := range c.events {
				t.Log(c.id, e)
			}
		}
	})
	c.id = c.wait("started").str("peer")
	return c
}

// kill ends the client as a power cut does.
func (c *rustClient) kill() {
	c.cmd.Process.Kill()
	<-c.done
	c.cmd.Wait()
}

// seen returns the events so far, from the nth.
func (c *rustClient) seen(n int) []rustEvent {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.events[n:])
}

// has reports whether there was such an event.
func (c *rustClient) has(event string, fields ...string) bool {
	return slices.ContainsFunc(c.seen(0), func(e rustEvent) bool { return e.is(event, fields...) })
}

// wait returns the first such event of all so far or to come.
func (c *rustClient) wait(event string, fields ...string) rustEvent {
	c.t.Helper()
	return c.waitFrom(0, event, fields...)
}

// waitFrom is wait without the first n events.
func (c *rustClient) waitFrom(n int, event string, fields ...string) rustEvent {
	c.t.Helper()
	e := c.first(n, time.Now().Add(testTimeout), func(e rustEvent) bool { return e.is(event, fields...) })
	if e == nil {
		c.t.Fatalf("not within %v: %s: %s %v", testTimeout, c.id, event, fields)
	}
	return e
}

// first returns the first event from the nth on that is ok, and nil when there was
// none until the deadline.
func (c *rustClient) first(n int, deadline time.Time, ok func(rustEvent) bool) rustEvent {
	late := time.NewTimer(time.Until(deadline))
	defer late.Stop()
	for {
		c.mu.Lock()
		events, more := c.events, c.more
		c.mu.Unlock()
		for ; n < len(events); n++ {
			if ok(events[n]) {
				return events[n]
			}
		}
		select {
		case <-more:
		case <-late.C:
			return nil
		}
	}
}

// carry sends bytes to mate over a connection that there is and returns the event
// that says that mate has them, or nil if it does not until the deadline. It sends
// again if the connection ends, as one does when both have dialled, or after a minute
// without messages. Greetings have 1 024 bytes, so a message of a test has another size.
func (c *rustClient) carry(mate *rustClient, bytes int, deadline time.Time) rustEvent {
	arrived := func(e rustEvent) bool {
		return e.is("synced", "peer", mate.id) && e["bytes"] == float64(bytes) && e["ok"] == true
	}
	again := time.NewTicker(250 * time.Millisecond)
	defer again.Stop()
	for n := len(c.seen(0)); ; <-again.C {
		c.command("carry %s %d", mate.id, bytes)
		e := c.first(n, deadline, func(e rustEvent) bool {
			return arrived(e) || e.is("not_connected", "peer", mate.id) || e.is("sync_failed", "peer", mate.id)
		})
		if e == nil || arrived(e) {
			return e
		}
		n = len(c.seen(0))
	}
}

func (c *rustClient) command(format string, args ...any) {
	fmt.Fprintf(c.stdin, format+"\n", args...)
}

// The product with its own clients: each finds the other by the sync code and
// connects, and one who comes late finds those who are there.
func TestRustClientsMeet(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=127.0.0.1"))
	a := startRust(t, r.info, "family")
	b := startRust(t, r.info, "family")
	a.wait("found", "peer", b.id)
	b.wait("found", "peer", a.id)
	a.wait("connected", "peer", b.id)
	b.wait("connected", "peer", a.id)

	late := startRust(t, r.info, "family")
	eventually(t, "the late joiner has found one of them", func() bool {
		return slices.ContainsFunc(late.seen(0), func(e rustEvent) bool { return e.is("found", "peer", a.id) || e.is("found", "peer", b.id) })
	})
	a.wait("found", "peer", late.id)
	b.wait("found", "peer", late.id)

	if a.carry(b, 16<<20, time.Now().Add(testTimeout)) == nil {
		t.Error("16 MiB did not arrive with the same digest")
	}
	for _, c := range []*rustClient{a, b, late} {
		for _, e := range c.seen(0) {
			if e.is("found_without_publisher") || e.is("put_failed") {
				t.Errorf("%s: %v", c.id, e)
			}
		}
	}
}

// A client that comes to know twenty strangers asks them, and not the relay, for
// its mate: so it must not come to know any.
func TestRustClientsKeepAskingTheRelay(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=127.0.0.1"))
	for range 2 * maxNamed {
		stranger := newClient(t)
		serveKad(t, stranger)
		connect(t, stranger, r)
	}
	first := startRust(t, r.info, "family")
	first.wait("stored")
	second := startRust(t, r.info, "family")
	second.wait("connected", "peer", first.id)
	first.wait("found", "peer", second.id)

	anybody := newTestPeerID(t).String()
	second.command("find %s", anybody)
	asked := second.wait("sought", "peer", anybody)["peers"].([]any)
	if !slices.Contains(asked, any(r.info.ID.String())) || len(asked) > 2 {
		t.Errorf("a query asked %v, want the relay, and the mate at most", asked)
	}
}

// Two devices that know different relays, which know one another; and then one of
// the relays is gone.
func TestRustClientsOfTwoRelaysMeet(t *testing.T) {
	ring := newRing(t, 2)
	a, b := startRust(t, ring[0].info, "family"), startRust(t, ring[1].info, "family")
	a.wait("found", "peer", b.id)
	b.wait("found", "peer", a.id)
	a.wait("connected", "peer", b.id)
	b.wait("connected", "peer", a.id)

	ring[0].close()
	late := startRust(t, ring[1].info, "family")
	late.wait("connected", "peer", b.id)
	late.wait("found", "peer", a.id) // which now publishes where b does
	late.wait("connected", "peer", a.id)
}

// The clients ask every relay that they have met, for their record and for random IDs. Of
// many relays they come to know those alone that they need.
func TestRustClientsKnowFewRelays(t *testing.T) {
	p := &party{alive: newRing(t, 8)}
	home := p.alive[0].info
	var clients []*rustClient
	for range 3 {
		clients = append(clients, startRust(t, home, "family"))
	}
	for _, c := range clients {
		for _, mate := range clients {
			if mate != c {
				c.wait("found", "peer", mate.id)
			}
		}
		eventually(t, "it has looked ten times", func() bool {
			return len(slices.DeleteFunc(c.seen(0), func(e rustEvent) bool { return !e.is("searched") })) > 10
		})
	}
	hash := sha256.Sum256([]byte("family"))
	needed := append(p.closest(append([]byte(recordPrefix+"syncgroup/"), hash[:]...)), home.ID)
	for _, c := range clients {
		met := 0
		for _, r := range p.alive {
			if c.has("connected", "peer", r.info.ID.String()) {
				met++
				if !slices.Contains(needed, r.info.ID) {
					t.Errorf("%s has met a relay that neither it nor its mates need", c.id)
				}
			}
		}
		t.Logf("a device has met %d relays of %d", met, len(p.alive))
	}
}

// Users of one relay who share no sync code stay strangers.
func TestRustClientsOfOtherCodesNeverMeet(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=127.0.0.1"))
	a1, b1 := startRust(t, r.info, "a"), startRust(t, r.info, "b")
	a2, b2 := startRust(t, r.info, "a"), startRust(t, r.info, "b")
	a1.wait("found", "peer", a2.id)
	a2.wait("found", "peer", a1.id)
	b1.wait("found", "peer", b2.id)
	b2.wait("found", "peer", b1.id)
	for _, pair := range [][2]*rustClient{{a1, b1}, {a1, b2}, {a2, b1}, {a2, b2}, {b1, a1}, {b1, a2}, {b2, a1}, {b2, a2}} {
		for _, e := range pair[0].seen(0) {
			if e.is("found", "peer", pair[1].id) {
				t.Errorf("%s found %s of another code", pair[0].id, pair[1].id)
			}
		}
	}
}

// The client side of a circuit is another implementation: reservation, its
// limits, and 16 MiB through the relay.
func TestRustCircuitCarriesSync(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=127.0.0.1"))
	// Neither can be dialled, so the circuit is the only path.
	dst := startRust(t, r.info, "x", "mode=circuits", "circuit=1", "dial=0", "listen=none")
	src := startRust(t, r.info, "y", "mode=circuits", "dial=0", "listen=none")
	if e := dst.wait("reserved"); e["bytes"] != float64(1<<30) || e["seconds"] != 3600.0 {
		t.Errorf("reservation = %v, want 1 GiB and an hour", e)
	}
	src.wait("identified", "peer", r.info.ID.String())
	src.command("dial %s/p2p/%s/p2p-circuit/p2p/%s", r.info.Addrs[0], r.info.ID, dst.id)
	if e := src.wait("connected", "peer", dst.id); e["circuit"] != true {
		t.Fatalf("connected = %v, want a circuit", e)
	}
	src.command("sync %s %d", dst.id, 16<<20)
	if e := src.wait("synced", "peer", dst.id); e["ok"] != true {
		t.Errorf("sync = %v, want the same digest", e)
	}
	dst.command("sync %s %d", src.id, 16<<20)
	if e := dst.wait("synced", "peer", src.id); e["ok"] != true {
		t.Errorf("sync back = %v, want the same digest", e)
	}
	if got := r.counters().relayedConnections; got != 1 {
		t.Errorf("relayed_connections = %d, want 1", got)
	}
}

// The path shrinks in the midst of a circuit's transfer, and the clients' own stack and the
// relay go on.
func TestRustCircuitOnAShrinkingPath(t *testing.T) {
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprintf("ICMP=%v", told), func(t *testing.T) {
			l := newLab(t)
			cloud, relay := l.relayInCloud()
			routers := []string{l.router("ra", "11.2.0.1/8", endpointDependent), l.router("rb", "11.2.0.2/8", endpointDependent)}
			var ends []*rustClient
			for i, r := range routers {
				by := []string{"ip", "netns", "exec", l.home(fmt.Sprint("c", i), r, 10)}
				ends = append(ends, startRustBy(t, by, relay, fmt.Sprint(i), "mode=circuits", "circuit=1", "dial=0", "listen=/ip4/0.0.0.0/udp/0/quic-v1", "tick_ms=1000"))
			}
			src, dst := ends[0], ends[1]
			dst.wait("reserved")
			src.wait("reserved")
			src.command("dial %s/p2p/%s/p2p-circuit/p2p/%s", relay.Addrs[0], relay.ID, dst.id)
			src.wait("connected", "peer", dst.id)
			dst.wait("connected", "peer", src.id)
			syncs := func(c, mate *rustClient) func() error {
				from := len(c.seen(0))
				c.command("sync %s %d", mate.id, 16<<20)
				return func() error {
					e := c.waitFrom(from, "synced", "peer", mate.id)
					t.Logf("16 MiB in %v ms", e["ms"])
					if e["ok"] != true {
						return fmt.Errorf("sync = %v", e)
					}
					return nil
				}
			}
			there, back := syncs(src, dst), syncs(dst, src) // find out what the path carries
			if err := errors.Join(there(), back()); err != nil {
				t.Fatal(err)
			}
			before := l.received(cloud)
			there, back = syncs(src, dst), syncs(dst, src)
			eventually(t, "the transfer is under way", func() bool { return l.received(cloud) > before+1<<20 })
			l.shrink(told, append(routers, cloud)...)
			if err := errors.Join(there(), back()); err != nil {
				t.Error(err)
			}
			src.waitFrom(len(src.seen(0)), "stored")
		})
	}
}

// What each side says of itself arrives on the other.
func TestRustIdentify(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=relay.example.org"))
	c := startRust(t, r.info, "x", "device=laptop")
	e := c.wait("identified", "peer", r.info.ID.String())
	if !e.is("identified", "protocol_version", "/privstack/relay/1.0.0", "agent_version", "privstack-relay/0.1.0") {
		t.Errorf("identified = %v, want the old relay's versions", e)
	}
	for _, want := range []string{"/ipfs/kad/1.0.0", "/libp2p/circuit/relay/0.2.0/hop"} {
		if !strings.Contains(fmt.Sprint(e["protocols"]), want) {
			t.Errorf("protocols = %v, want %s among them", e["protocols"], want)
		}
	}
	if want := "/dns/relay.example.org/udp/" + listenPort(r.relay) + "/quic-v1"; !strings.Contains(fmt.Sprint(e["listen_addrs"]), want) {
		t.Errorf("listen_addrs = %v, want %s", e["listen_addrs"], want)
	}
	id, err := peer.Decode(c.id)
	if err != nil {
		t.Fatal(err)
	}
	if got := r.host.Network().ConnsToPeer(id)[0].RemoteMultiaddr().String(); got != e.str("observed") {
		t.Errorf("the client is told it was observed as %v, want %s", e["observed"], got)
	}
	eventually(t, "the relay keeps that the client speaks kad", func() bool {
		said, err := r.host.Peerstore().GetProtocols(id)
		return err == nil && slices.Contains(said, kadProtocol)
	})
}

// A power cut at the relay: the clients, which nobody restarts, find each other
// again.
func TestRustClientsSurviveRelayCrash(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	p := start(t, "--announce=127.0.0.1", "--identity="+key)
	port, _ := p.bootstrap.Addrs[0].ValueForProtocol(ma.P_UDP)
	a := startRust(t, p.bootstrap, "family", "dial=0")
	b := startRust(t, p.bootstrap, "family", "dial=0")
	a.wait("found", "peer", b.id)
	b.wait("found", "peer", a.id)

	p.Process.Signal(syscall.SIGKILL)
	p.wait(t)
	again := start(t, "--port="+port, "--announce=127.0.0.1", "--identity="+key)
	if again.peerID != p.peerID {
		t.Fatalf("peer ID is %s after the crash, was %s", again.peerID, p.peerID)
	}
	began := time.Now()
	nA, nB := len(a.seen(0)), len(b.seen(0))
	a.waitFrom(nA, "found", "peer", b.id)
	b.waitFrom(nB, "found", "peer", a.id)
	t.Logf("found each other %v after the relay was back (the clients' idle timeout is 10 s)", time.Since(began).Round(100*time.Millisecond))
}

// rust-libp2p drops an answer above 16 KiB without a word, and the query with it.
func TestRustReadsTheLargestAnswer(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=127.0.0.1"))
	// As large a group as is remembered, of devices that report as many addresses, as
	// long as are handed out, and the largest record.
	key := slices.Concat([]byte(recordPrefix), make([]byte, maxRecordKey-len(recordPrefix)))
	var asker host.Host
	for i := range groupMembers {
		var reported []ma.Multiaddr
		for j := range 20 {
			reported = append(reported, ma.StringCast(fmt.Sprintf("/ip4/10.0.%d.%d/udp/9/quic-v1", i, j+1)))
		}
		asker = newClient(t, libp2p.AddrsFactory(func([]ma.Multiaddr) []ma.Multiaddr { return reported }))
		serveKad(t, asker)
		connect(t, asker, r)
		if err := put(t, asker, r, rustRecord(key, strings.Repeat("v", maxRecordValue), asker.ID(), 1<<30)); err != nil {
			t.Fatal(err)
		}
	}
	resp := ask(t, asker, r, kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0))
	// All are in one home, and one of those that it has not met is named at a time.
	if size := proto.Size(resp); size > 16<<10 || len(resp.CloserPeers) != groupMembers-1 {
		t.Errorf("answer of %d bytes with %d peers, want at most 16 KiB and %d", size, len(resp.CloserPeers), groupMembers-1)
	} else {
		t.Logf("%d bytes with %d peers", size, len(resp.CloserPeers))
	}

	c := startRust(t, r.info, "x", "dial=0")
	c.wait("connected", "peer", r.info.ID.String())
	c.command("find %s", asker.ID())
	if e := c.wait("sought", "peer", asker.ID().String()); e["answers"] == 0.0 {
		t.Errorf("query = %v, want the relay's answer to have been read", e)
	}
}
