package main

// Faults: power cuts, full disks, a thousand clients at once, and clients that break the
// rules.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
)

// Power can fail during the first start. Then the key file is either missing or complete,
// and the next start works.
func TestFirstStartKilledLeavesNoHalfKey(t *testing.T) {
	var absent, whole, temporary int
	delay := 20 * time.Millisecond
	for range 200 {
		cmd := command(t)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Half of the starts should be killed just before the key is written, and half just
		// after.
		<-time.After(time.Duration(float64(delay) * (0.8 + 0.4*rand.Float64())))
		cmd.Process.Kill()
		cmd.Wait()

		path := filepath.Join(cmd.Dir, "relay-identity.key")
		data, err := os.ReadFile(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
			absent++
			delay = delay * 11 / 10
		case err != nil || len(data) != identitySize:
			t.Fatalf("key file holds %d bytes, %v", len(data), err)
		default:
			whole++
			delay = delay * 10 / 11
		}
		left, _ := filepath.Glob(filepath.Join(cmd.Dir, ".relay-identity-*"))
		temporary += len(left)
		id, err := loadOrCreateIdentity(path)
		if err != nil {
			t.Fatalf("next start: %v", err)
		}
		if data != nil && !bytes.Equal(encodeIdentity(id.key), data) {
			t.Fatal("the next start uses another key than the file has")
		}
	}
	t.Logf("of 200 first starts that were killed, %d left no key and %d a complete one; %d left a temporary file", absent, whole, temporary)
	if absent == 0 || whole == 0 {
		t.Error("no start was killed around the moment at which the key is written")
	}
}

// A first start that cannot save its key says so, and leaves nothing behind.
func TestFirstStartWithoutRoomForTheKey(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("needs Linux and root, to mount")
	}
	if out, err := exec.Command("unshare", "--mount", "true").CombinedOutput(); err != nil {
		t.Skipf("no mount namespaces here: %v: %s", err, out)
	}
	for _, tt := range []struct{ name, mount, as, says string }{
		{"full disk", "mount -t tmpfs -o size=4k none . && cd . && dd if=/dev/zero of=full bs=4k count=1 status=none", "", "no space left on device"},
		{"no inode left", "mount -t tmpfs -o nr_inodes=2 none . && cd . && touch full", "", "no space left on device"},
		{"read-only file system", "mount -t tmpfs -o ro none .", "", "read-only file system"},
		{"another user's directory", "mount -t tmpfs -o mode=755 none .", "setpriv --reuid=65534 --regid=65534 --clear-groups", "permission denied"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			relay := command(t, "--port=0", "--http-port=0", "--identity=state/key")
			if err := os.Mkdir(filepath.Join(relay.Dir, "state"), 0o700); err != nil {
				t.Fatal(err)
			}
			// Here every user may run it.
			if err := os.Chmod(relay.Dir, 0o755); err != nil {
				t.Fatal(err)
			}
			binary, err := os.ReadFile(relay.Path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(relay.Dir, "relay"), binary, 0o755); err != nil {
				t.Fatal(err)
			}
			script := fmt.Sprintf("cd state && %s && cd .. && { %s ./relay %s; echo status=$?; ls -A state; }",
				tt.mount, tt.as, strings.Join(relay.Args[1:], " "))
			sh := exec.CommandContext(testContext(t), "unshare", "--mount", "sh", "-c", script)
			sh.Dir = relay.Dir
			out, err := sh.CombinedOutput()
			got := string(out)
			if err != nil || !strings.Contains(got, tt.says) || !strings.Contains(got, "status=1\n") || !strings.HasPrefix(got, "privstack-relay: identity: ") {
				t.Errorf("%v: %s\nwant exit status 1 and %q", err, got, tt.says)
			}
			if _, left, _ := strings.Cut(got, "status=1\n"); strings.Contains(left, ".relay-identity") {
				t.Errorf("a temporary file is left:\n%s", got)
			}
		})
	}
}

// A thousand clients come back at once after the relay was killed. The relay refuses none,
// although on a slow machine some may time out.
func TestThousandClientsReturnAtOnce(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	p := start(t, "--identity="+key)
	port, _ := p.bootstrap.Addrs[0].ValueForProtocol(ma.P_UDP)

	const n = 1000
	c := newCrowd(t, n)
	who := make([]lightIdentity, n)
	for i := range who {
		who[i] = newLightIdentity(t)
	}
	// join connects everyone, and returns the errors of those that the relay refused.
	join := func(p *process) (refused []error) {
		var mu sync.Mutex
		var joining sync.WaitGroup
		for _, w := range who {
			joining.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 2*testTimeout)
				defer cancel()
				for tries := 1; ; tries++ {
					client, err := c.dial(ctx, w, p.bootstrap)
					if err == nil {
						// Only an answer shows that the relay took the connection.
						_, err = client.named(ctx, w.id)
					}
					if err == nil {
						return
					}
					if ctx.Err() != nil {
						t.Errorf("a client is not connected after %d tries: %v", tries, err)
						return
					}
					lost := errors.As(err, new(*quicgo.IdleTimeoutError)) || errors.As(err, new(*quicgo.StatelessResetError))
					if !lost {
						mu.Lock()
						refused = append(refused, err)
						mu.Unlock()
					}
				}
			})
		}
		joining.Wait()
		return refused
	}
	for _, round := range []string{"first start", "after a crash"} {
		began := time.Now()
		refused := join(p)
		took := time.Since(began)
		t.Logf("%s: %d clients connected in %.1f s, %.0f a second", round, n, took.Seconds(), n/took.Seconds())
		if len(refused) > 0 {
			t.Errorf("%s: the relay refused %d connections; the first error is: %v", round, len(refused), refused[0])
		}
		p.Process.Kill()
		<-p.rest
		p.Cmd.Wait()
		if round == "first start" {
			p = start(t, "--identity="+key, "--port="+port)
		}
	}
}

// ownGoroutines runs f. count returns how many of the goroutines that f started, directly or
// indirectly, still run; others of this process do not count.
func ownGoroutines(t *testing.T, f func()) (count func() int) {
	t.Helper()
	label := fmt.Sprintf("%s-%d", t.Name(), rand.Int())
	pprof.Do(context.Background(), pprof.Labels("test", label), func(context.Context) { f() })
	return func() (n int) {
		var profile bytes.Buffer
		pprof.Lookup("goroutine").WriteTo(&profile, 1)
		// A line "3 @ 0x…" stands for three goroutines. A line with their labels
		// follows, if they have any.
		alike := 0
		for line := range strings.Lines(profile.String()) {
			if strings.Contains(line, " @ 0x") {
				fmt.Sscan(line, &alike)
			} else if strings.HasPrefix(line, "# labels:") && strings.Contains(line, label) {
				n += alike
			}
		}
		return n
	}
}

// usage returns what the relay's resource manager counts for all clients.
func (r testRelay) usage(t *testing.T) (stat network.ScopeStat) {
	t.Helper()
	err := r.host.Network().ResourceManager().ViewSystem(func(s network.ResourceScope) error {
		stat = s.Stat()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return stat
}

// holdsNothing waits until the relay's rooms hold nothing for clients, who have left.
func (r testRelay) holdsNothing(t *testing.T) {
	t.Helper()
	var left string
	defer func() {
		if left != "" {
			t.Log("what the relay still holds: ", left)
		}
	}()
	eventually(t, "the relay holds nothing for anybody", func() bool {
		left = r.left()
		return left == ""
	})
}

// left says what the relay's rooms still hold for clients; empty: nothing.
func (r testRelay) left() string {
	var left []string
	add := func(what string, n int) {
		if n != 0 {
			left = append(left, fmt.Sprint(n, " ", what))
		}
	}
	networks, pieces := &r.sockets.networks, r.sockets.pieces
	networks.mu.Lock()
	add("networks with connections", len(networks.conns))
	add("places that move", len(networks.moving))
	networks.mu.Unlock()
	pieces.mu.Lock()
	add("accounts", len(pieces.conns))
	pieces.mu.Unlock()
	pieces.budgets.mu.Lock()
	for _, b := range pieces.budgets.by {
		add("users of a budget", b.users)
	}
	pieces.budgets.mu.Unlock()
	add("unproven connections", int(r.sockets.unproven.Load()))
	r.peers.mu.Lock()
	add("identified peers", len(r.peers.identified))
	add("reserved peers", len(r.peers.reserved))
	add("connections whose identify is awaited", len(r.peers.awaited))
	r.peers.mu.Unlock()
	r.groups.mu.Lock()
	add("groups", len(r.groups.members))
	add("peers in groups", len(r.groups.keys))
	r.groups.mu.Unlock()
	r.circuits.mu.Lock()
	add("parts of circuits", len(r.circuits.parts))
	r.circuits.mu.Unlock()
	for i := range clock(3) { // to see that they are gone, and to forget them
		r.bridge.sweep(r.bridge.clock() + i*groupAge)
	}
	r.bridge.lock()
	add("clients of the bridge", len(r.bridge.clients))
	add("flows", r.bridge.flows)
	add("networks with flows", len(r.bridge.byCaller))
	add("dials held", r.bridge.holding+len(r.bridge.held))
	for _, side := range r.bridge.sides {
		add("ends", len(side.ends))
		add("legs", len(side.legs))
	}
	r.bridge.unlock()
	c := r.counters()
	for what, n := range map[string]int{"clients": c.clients, "connections": c.connections, "reservations": int(c.reservations), "circuits": c.circuits, "bridges": int(c.bridges)} {
		add(what+" in the metrics", n)
	}
	return strings.Join(left, ", ")
}

// misbehaviours are things that a pair of clients can do to a relay. Each returns the
// streams that it leaves open.
var misbehaviours = []struct {
	name string

	// ends says that the relay itself ends the streams, sooner or later.
	ends bool

	do func(ctx context.Context, r testRelay, a, b *lightClient) ([]*quicgo.Stream, error)
}{
	{"silent on every protocol", true, func(ctx context.Context, r testRelay, a, b *lightClient) (open []*quicgo.Stream, err error) {
		for _, protocol := range r.host.Mux().Protocols() {
			s, err := a.open(ctx, string(protocol))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", protocol, err)
			}
			open = append(open, s)
		}
		return open, nil
	}},
	{"silent before any protocol", true, func(ctx context.Context, r testRelay, a, b *lightClient) ([]*quicgo.Stream, error) {
		s, err := a.OpenStreamSync(ctx)
		if err != nil {
			return nil, err
		}
		_, err = s.Write([]byte("\x13/multi")) // without a byte the relay would not see the stream
		return []*quicgo.Stream{s}, err
	}},
	{"garbage on every protocol", true, func(ctx context.Context, r testRelay, a, b *lightClient) (open []*quicgo.Stream, err error) {
		for _, protocol := range append(r.host.Mux().Protocols(), "") {
			for _, garbage := range []string{
				"\x00", "\x05junk!", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "\xff\xff\xff\x7f",
				strings.Repeat("\x02\x08\x7f", 1000), strings.Repeat("\n", 100_000),
			} {
				var s *quicgo.Stream
				if protocol == "" {
					s, err = a.OpenStreamSync(ctx)
				} else {
					s, err = a.open(ctx, string(protocol))
				}
				if err != nil {
					return nil, fmt.Errorf("%s: %w", protocol, err)
				}
				s.Write([]byte(garbage)) // the relay may end the stream before it has read all
				open = append(open, s)
			}
		}
		return open, nil
	}},
	{"circuit that nobody takes", true, func(ctx context.Context, r testRelay, a, b *lightClient) ([]*quicgo.Stream, error) {
		if err := b.reserve(ctx); err != nil {
			return nil, err
		}
		s, err := a.open(ctx, string(proto.ProtoIDv2Hop))
		if err != nil {
			return nil, err
		}
		connect := circuitpb.HopMessage_CONNECT
		if _, err := protodelim.MarshalTo(s, &circuitpb.HopMessage{Type: &connect, Peer: &circuitpb.Peer{Id: []byte(b.id)}}); err != nil {
			return nil, err
		}
		select {
		case offered := <-b.stops:
			return []*quicgo.Stream{s, offered}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}},
	{"circuit of which one end has left", true, func(ctx context.Context, r testRelay, a, b *lightClient) ([]*quicgo.Stream, error) {
		_, taken, err := a.circuitTo(ctx, b)
		if err != nil {
			return nil, err
		}
		a.CloseWithError(0, "")
		return []*quicgo.Stream{taken}, nil
	}},
	{"circuit that is not read", false, func(ctx context.Context, r testRelay, a, b *lightClient) ([]*quicgo.Stream, error) {
		s, taken, err := a.circuitTo(ctx, b)
		if err != nil {
			return nil, err
		}
		// Write until the relay takes no more.
		for err = nil; err == nil; {
			s.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			_, err = s.Write(make([]byte, 64<<10))
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, err
		}
		return []*quicgo.Stream{s, taken}, nil
	}},
	{"circuit closed for writing by both ends, and not read", false, func(ctx context.Context, r testRelay, a, b *lightClient) ([]*quicgo.Stream, error) {
		s, taken, err := a.circuitTo(ctx, b)
		if err != nil {
			return nil, err
		}
		for _, s := range []*quicgo.Stream{s, taken} {
			if _, err := s.Write(make([]byte, 1024)); err != nil {
				return nil, err
			}
			s.Close()
		}
		return []*quicgo.Stream{s, taken}, nil
	}},
}

// When clients have left, everything is as it was before they came, whatever they did.
func TestMisbehaviourLeavesNothingBehind(t *testing.T) {
	const pairs = 20
	var r testRelay
	lim := limits{clients: 5000, perNetwork: 5000, testOnlyLimitLoopback: true} // so that networks are counted
	goroutines := ownGoroutines(t, func() { r = newTestRelayWithin(t, lim, defaultConfig(t), newTestKey(t)) })
	c := newCrowd(t, 2*pairs+2)
	// The same clients in every round, because libp2p remembers peers for a minute or two.
	var who [pairs + 1][2]lightIdentity
	for i := range who {
		who[i] = [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)}
	}
	atRest := goroutines()

	for _, m := range misbehaviours {
		t.Run(m.name, func(t *testing.T) {
			misbehave := func() {
				ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
				defer cancel()
				var clients []*lightClient
				for _, who := range who[1:] {
					a, b := c.pair(ctx, t, r, who)
					clients = append(clients, a, b)
					if _, err := m.do(ctx, r, a, b); err != nil {
						t.Fatal(err)
					}
				}
				// Honest clients are served meanwhile.
				honest, mate := c.pair(ctx, t, r, who[0])
				clients = append(clients, honest, mate)
				from, to, err := honest.circuitTo(ctx, mate)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					from.Write(make([]byte, 1<<20))
					from.Close()
				}()
				if n, err := io.Copy(io.Discard, to); n != 1<<20 || err != nil {
					t.Errorf("an honest circuit carried %d bytes, %v", n, err)
				}
				held := r.usage(t)
				t.Logf("%d pairs and an honest one: %d goroutines, %d streams, %d KiB accounted", pairs, goroutines(), held.NumStreamsInbound+held.NumStreamsOutbound, held.Memory>>10)
				for _, client := range clients {
					client.CloseWithError(0, "")
				}
				eventually(t, "the resource manager counts nothing", func() bool { return r.usage(t) == network.ScopeStat{} })
				r.holdsNothing(t)
			}
			misbehave() // first for memory that is allocated only once
			before := liveHeap()
			misbehave()
			eventually(t, "the relay has no more goroutines than before", func() bool { return goroutines() <= atRest })
			// The clients are in this heap too, and take a while to go.
			var after uint64
			eventually(t, "the heap is as small as before", func() bool {
				after = liveHeap()
				return after < before+pairs*2<<10
			})
			t.Logf("%d goroutines; heap %d KiB before, %d KiB after", goroutines(), before>>10, after>>10)
		})
	}
}

// The relay ends what connected clients leave open and do not use.
func TestRelayEndsWhatClientsLeaveOpen(t *testing.T) {
	t.Parallel() // the longest of the timeouts is a minute
	r := newTestRelay(t, defaultConfig(t))
	c := newCrowd(t, 2*len(misbehaviours))
	var waiting sync.WaitGroup
	defer waiting.Wait()
	for _, m := range misbehaviours {
		if !m.ends {
			continue
		}
		a, b := c.pair(testContext(t), t, r, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
		open, err := m.do(testContext(t), r, a, b)
		if err != nil {
			t.Fatalf("%s: %v", m.name, err)
		}
		for _, s := range open {
			waiting.Go(func() {
				s.SetReadDeadline(time.Now().Add(3 * testTimeout))
				if _, err := io.Copy(io.Discard, s); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s: the relay leaves stream %d open", m.name, s.StreamID())
				}
			})
		}
	}
}

// A name that does not resolve is told once, by us: go-libp2p's swarm would warn at each
// dial, for as long as DNS is down.
func TestSwarmWarnsOfNoName(t *testing.T) {
	l := newLab(t)
	cmd := command(t, "--port=0", "--http-port=0", "--bootstrap=/dns4/relay.invalid/udp/4001/quic-v1/p2p/"+newLightIdentity(t).id.String())
	cmd.Args = append([]string{"ip", "netns", "exec", l.namespace("alone")}, cmd.Args...)
	cmd.Path, _ = exec.LookPath("ip")
	p := launch(t, cmd)
	eventually(t, "the relay says that the name does not resolve", func() bool { return strings.Contains(p.stderr.String(), "relay.invalid") })
	p.Process.Signal(syscall.SIGTERM)
	p.wait(t)
	if strings.Contains(p.stderr.String(), "logger=swarm2") {
		t.Errorf("the swarm's lines are in the log:\n%s", p.stderr)
	}
}
