//go:build linux

package main

// Attacks: clients do all they can against a relay that has no more memory than its
// start log promises. Meanwhile the devices of an honest group publish and find each
// other, and they must succeed.
//
// Each test prints its figures. With go test the attacks are small. ATTACKS=full runs
// them at full size, which takes five minutes:
//
//	ATTACKS=full go test -run Attack -v -timeout 40m .

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/multiformats/go-multistream"
	quicgo "github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"
)

// sized returns the size of an attack: quick, or whole with ATTACKS=full.
func sized[T any](quick, whole T) T {
	if os.Getenv("ATTACKS") == "full" {
		return whole
	}
	return quick
}

// siege is a relay process under attack.
type siege struct {
	*process
	t        *testing.T
	promised int64  // bytes, as the start log says
	cgroup   string // directory of the cgroup that limits its memory; empty if there is none
}

// siegeClients is --max-clients of a relay under attack.
const siegeClients = 1000

// besieged starts a relay on loopback, with an honest group. The attackers have another
// address, and that many sockets.
func besieged(t *testing.T, sockets int) (s *siege, g *group, attackers *crowd) {
	t.Helper()
	s = besiege(t, command(t, "--port=0", "--http-port=0", fmt.Sprint("--max-clients=", siegeClients)))
	g = newGroup(t, loopbackCrowd(t, "127.0.0.2", 1), s.bootstrap)
	return s, g, loopbackCrowd(t, "127.0.0.1", sockets)
}

// besiege starts the relay by cmd, in a cgroup with the promised memory if possible.
func besiege(t *testing.T, cmd *exec.Cmd) *siege {
	t.Helper()
	s := &siege{t: t, promised: limits{clients: siegeClients}.memory()}
	if s.cgroup = memoryCgroup(t, s.promised); s.cgroup != "" {
		join := []string{"sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, s.cgroup}
		cmd.Args = append(join, append([]string{cmd.Path}, cmd.Args[1:]...)...)
		cmd.Path, _ = exec.LookPath("sh")
	}
	s.process = launch(t, cmd)
	return s
}

// memoryCgroup makes a cgroup whose processes together get that many bytes and no more. It
// returns "" where the test may not make one.
func memoryCgroup(t *testing.T, bytes int64) (dir string) {
	t.Helper()
	for root, file := range map[string]string{
		"/sys/fs/cgroup/memory": "memory.limit_in_bytes", // version 1
		"/sys/fs/cgroup":        "memory.max",
	} {
		if _, err := os.Stat(root + "/cgroup.procs"); err != nil {
			continue
		}
		dir, err := os.MkdirTemp(root, "privstack-relay-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { // runs after launch's, which kills the process
			eventually(t, "the cgroup is empty", func() bool { return os.Remove(dir) == nil })
		})
		// In version 2 the file is missing unless the parent hands the controller down.
		limit, err := os.OpenFile(dir+"/"+file, os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		_, err = fmt.Fprint(limit, bytes)
		if limit.Close(); err == nil {
			return dir
		}
	}
	t.Log("cannot make a cgroup: memory is measured, but not limited")
	return ""
}

// reclaimed returns how often the cgroup reached its limit, and the most bytes that it
// had. These include the binary's pages and the kernel's memory for the process.
func (s *siege) reclaimed() (hits, most int64) {
	for _, f := range []struct {
		name string
		n    *int64
	}{{"memory.failcnt", &hits}, {"memory.max_usage_in_bytes", &most}, {"memory.peak", &most}} {
		if data, err := os.ReadFile(s.cgroup + "/" + f.name); err == nil {
			*f.n, _ = strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		}
	}
	return hits, most
}

// end fails the test if the relay died, took more memory than promised, refuses a newcomer
// now, or did not serve the group all the time.
func (s *siege) end(g *group) {
	s.t.Helper()
	g.end()
	peak := s.peakRSS(s.t)
	s.t.Logf("relay: at most %d MiB of %d promised, %.1f s of CPU", peak>>20, s.promised>>20, s.cpu(s.t).Seconds())
	if s.cgroup != "" {
		hits, most := s.reclaimed()
		s.t.Logf("cgroup of %d MiB: at most %d used, limit reached %d times", s.promised>>20, most>>20, hits)
	}
	if peak > s.promised {
		s.t.Errorf("the relay took %d MiB, more than the %d that its log promises", peak>>20, s.promised>>20)
	}
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	who := newLightIdentity(s.t)
	client, err := g.crowd.dial(ctx, who, s.bootstrap)
	if err == nil {
		_, err = client.named(ctx, who.id)
	}
	if err != nil {
		s.t.Errorf("a newcomer after the attack: %v", err)
	}
	s.kill()
	if !strings.Contains(s.stderr.String(), fmt.Sprint("max_memory_bytes=", s.promised)) {
		s.t.Errorf("the start log does not promise %d MiB:\n%s", s.promised>>20, s.stderr)
	}
}

// group is two honest devices that share a key.
type group struct {
	t            *testing.T
	crowd        *crowd
	a, b         *lightClient
	tries, found atomic.Int64
	stop         func()
}

// newGroup connects two devices. One publishes a record and refreshes it every 30 s; the
// other looks for it all the time, until stop.
func newGroup(t *testing.T, c *crowd, relay peer.AddrInfo) *group {
	t.Helper()
	g := &group{t: t, crowd: c}
	var err error
	if g.a, err = c.newcomer(testContext(t), relay); err != nil {
		t.Fatal(err)
	}
	if g.b, err = c.newcomer(testContext(t), relay); err != nil {
		t.Fatal(err)
	}
	publish := func(ctx context.Context) error { return g.a.putValue(ctx, "honest", "here I am") }
	if err := publish(testContext(t)); err != nil {
		t.Fatal(err)
	}
	// A device is named only once it is identified.
	eventually(t, "the mate is named", func() bool { ok, _ := g.b.named(testContext(t), g.a.id); return ok })
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		refresh := time.NewTicker(30 * time.Second)
		defer refresh.Stop()
		look := time.NewTicker(20 * time.Millisecond)
		defer look.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-refresh.C:
				publish(ctx)
			case <-look.C:
				try, cancel := context.WithTimeout(ctx, testTimeout)
				ok := g.look(try) == nil
				cancel()
				if ctx.Err() != nil {
					return
				}
				g.tries.Add(1)
				if ok {
					g.found.Add(1)
				}
			}
		}
	})
	g.stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(g.stop)
	return g
}

// look finds the record and the mate's address, or returns why not.
func (g *group) look(ctx context.Context) error {
	resp, err := g.b.ask(ctx, kadpb.NewMessage(kadpb.Message_GET_VALUE, []byte(recordPrefix+"syncgroup/honest"), 0))
	if err != nil {
		return err
	}
	if string(resp.GetRecord().GetValue()) != "here I am" {
		return errors.New("no record")
	}
	if ok, err := g.b.named(ctx, g.a.id); err != nil || !ok {
		return errors.Join(err, errors.New("mate not named"))
	}
	return nil
}

// goesOn waits until the group has looked another hundred times.
func (g *group) goesOn() {
	g.t.Helper()
	before := g.tries.Load()
	eventually(g.t, "the honest group goes on", func() bool { return g.tries.Load() > before+100 })
}

// end stops the group, and fails the test if less than 99 % of its tries succeeded.
func (g *group) end() {
	g.t.Helper()
	g.stop()
	tries, found := g.tries.Load(), g.found.Load()
	g.t.Logf("honest group: %d of %d tries succeeded", found, tries)
	if tries == 0 || found*100 < tries*99 {
		g.t.Errorf("%d of %d tries of the honest group succeeded, want 99 %%", found, tries)
	}
}

// A spammer fills the store. Others are found all the same.
func TestAttackPutFlood(t *testing.T) {
	for _, attackers := range []int{1, 50} {
		t.Run(fmt.Sprint(attackers, " peers on one IP"), func(t *testing.T) {
			s, g, c := besieged(t, 4)
			flooders := make([]*lightClient, attackers)
			inParallel(t, attackers, 16, func(ctx context.Context, i int) (err error) {
				flooders[i], err = c.newcomer(ctx, s.bootstrap)
				return err
			})
			value := strings.Repeat("x", maxRecordValue)
			n, began := sized(4000, 100_000), time.Now()
			var refused atomic.Int64
			inParallel(t, n, 50, func(ctx context.Context, i int) error {
				if err := flooders[i%attackers].putValue(ctx, fmt.Sprint("flood ", i), value); err != nil {
					refused.Add(1)
				}
				return nil
			})
			t.Logf("%d records of 8 KiB in %.1f s, %d failed", n, time.Since(began).Seconds(), refused.Load())
			s.end(g)
		})
	}
}

// An attacker with one address gets one address's share, however many identities he has.
func TestAttackFreshIdentities(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	honestNS, attackerNS := l.public("honest", "11.0.0.2/8"), l.public("attacker", "11.0.0.3/8")
	honest := newCrowdFrom(t, l.sockets(honestNS, "11.0.0.2", 2))
	g := newGroup(t, honest, s.bootstrap)
	c := newCrowdFrom(t, l.sockets(attackerNS, "11.0.0.3", 8))
	// Up to 100 000, as many as the time allows: each makes a key and a certificate.
	ctx, cancel := context.WithTimeout(context.Background(), sized(8*time.Second, 5*time.Minute))
	defer cancel()
	var tried, in atomic.Int64
	var attacking sync.WaitGroup
	for range 32 {
		attacking.Go(func() {
			for ctx.Err() == nil && tried.Add(1) <= 100_000 {
				if _, err := c.newcomer(ctx, s.bootstrap); err == nil {
					in.Add(1)
				}
			}
		})
	}
	attacking.Wait()
	// Newcomers from other addresses get in.
	if _, err := honest.newcomer(testContext(t), s.bootstrap); err != nil {
		t.Errorf("a newcomer from another address: %v", err)
	}
	t.Logf("%d identities tried to get in from one address, %d succeeded", tried.Load(), in.Load())
	// 256 are let in at once, and as many again in 30 s.
	if most := int64(256 * (2 + sized(8, 300)/30)); in.Load() > most {
		t.Errorf("%d got in, want at most %d", in.Load(), most)
	}
	s.end(g)
}

// Opening and dropping reservations and circuits all day leaves nothing that adds up.
func TestAttackOpenAndDrop(t *testing.T) {
	s, g, c := besieged(t, 4)
	ctx, cancel := context.WithTimeout(context.Background(), sized(4*time.Second, time.Minute))
	defer cancel()
	var reservations, circuits atomic.Int64
	var attacking sync.WaitGroup
	for range 20 {
		a, b := c.pair(testContext(t), t, testRelay{info: s.bootstrap}, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
		attacking.Go(func() {
			for ctx.Err() == nil {
				if a.reserve(ctx) == nil {
					reservations.Add(1)
				}
				from, to, err := a.circuitTo(ctx, b)
				if err != nil {
					continue
				}
				circuits.Add(1)
				from.Write([]byte("x"))
				for _, s := range []*quicgo.Stream{from, to} {
					s.CancelRead(0)
					s.CancelWrite(0)
				}
			}
		})
	}
	attacking.Wait()
	t.Logf("%d reservations and %d circuits opened and dropped", reservations.Load(), circuits.Load())
	if circuits.Load() == 0 {
		t.Error("no circuit was opened")
	}
	s.end(g)
}

// Streams that are opened and left alone use up their owner's share and nobody else's.
func TestAttackStreamsLeftOpen(t *testing.T) {
	s, g, c := besieged(t, 4)
	protocols := []string{string(kadProtocol), string(proto.ProtoIDv2Hop), identify.ID, identify.IDPush, "/ipfs/ping/1.0.0", ""}
	var opened, ended atomic.Int64
	inParallel(t, sized(100, siegeClients-20), 16, func(ctx context.Context, i int) error {
		client, err := c.newcomer(ctx, s.bootstrap)
		if err != nil {
			return err
		}
		for i := range 256 {
			// The relay ends streams above its limit, which makes room for more.
			room, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			stream, err := client.OpenStreamSync(room)
			cancel()
			if err != nil {
				break
			}
			opened.Add(1)
			stream.SetDeadline(time.Now().Add(testTimeout))
			if protocol := protocols[i%len(protocols)]; protocol != "" {
				go func() { // ends with the relay, at the latest
					if multistream.SelectProtoOrFail(protocol, stream) != nil {
						ended.Add(1)
					}
				}()
				continue
			}
			stream.Write([]byte("\x13/multi"))
		}
		return nil
	})
	g.goesOn() // while the streams are open
	t.Logf("%d streams left open, %d ended by the relay so far", opened.Load(), ended.Load())
	s.end(g)
}

// Data for a circuit whose other end does not read waits at its sender, not in the
// relay.
func TestAttackCircuitsNobodyReads(t *testing.T) {
	s, g, c := besieged(t, 8)
	var taken, opened atomic.Int64
	inParallel(t, sized(50, siegeClients/2-10), 16, func(ctx context.Context, i int) error {
		a, err := c.newcomer(ctx, s.bootstrap)
		if err != nil {
			return err
		}
		b, err := c.newcomer(ctx, s.bootstrap)
		if err != nil {
			return err
		}
		from, to, err := a.circuitTo(ctx, b)
		if err != nil {
			return nil // the relay has no more memory for circuits
		}
		opened.Add(1)
		// The other end reads at first, so that the relay's windows grow.
		from.SetDeadline(time.Now().Add(sized(time.Second, 3*time.Second)))
		read := make(chan struct{})
		go func() {
			defer close(read)
			io.CopyN(io.Discard, to, 2<<20)
		}()
		chunk := make([]byte, 64<<10)
		for err == nil {
			var n int
			n, err = from.Write(chunk)
			taken.Add(int64(n))
		}
		to.SetDeadline(time.Now()) // ends a reader that did not get that far
		<-read
		return nil
	})
	g.goesOn() // while the circuits are stuck
	t.Logf("%d circuits took %d MiB before they got stuck", opened.Load(), taken.Load()>>20)
	if opened.Load() == 0 {
		t.Error("no circuit was opened")
	}
	s.end(g)
}

// However much a client reports about itself in identify, answers do not grow, and nothing
// is told about anyone else.
func TestAttackIdentifyAddresses(t *testing.T) {
	s, g, c := besieged(t, 2)
	var lies []ma.Multiaddr
	for i := range 200 {
		lies = append(lies,
			ma.StringCast(fmt.Sprintf("/ip4/11.9.%d.%d/udp/9/quic-v1", i/256, i%256)),
			ma.StringCast(fmt.Sprintf("/ip4/10.9.%d.%d/udp/9/quic-v1", i/256, i%256)))
	}
	for range 100 {
		lies = append(lies, ma.StringCast("/ip4/11.8.0.1/udp/9/quic-v1/p2p/"+g.a.id.String()))
	}
	liars := make([]*lightClient, 50)
	inParallel(t, len(liars), 16, func(ctx context.Context, i int) (err error) {
		who, err := makeLightIdentity()
		if err != nil {
			return err
		}
		who.listen = lies[i:]
		liars[i], err = c.dial(ctx, who, s.bootstrap)
		return err
	})
	for _, liar := range append(liars, g.a) {
		var addrs []ma.Multiaddr
		honestOne, whole := liar == g.a, 2
		if !honestOne {
			whole = maxAddrsPerPeer // once the relay has read the lies
		}
		eventually(t, "the answer has all addresses", func() bool {
			resp, err := g.b.ask(testContext(t), kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(liar.id), 0))
			if err != nil {
				t.Fatal(err)
			}
			addrs = nil
			for _, p := range resp.GetCloserPeers() {
				if len(p.Addrs) > maxAddrsPerPeer {
					t.Fatalf("an answer names %d addresses of one peer", len(p.Addrs))
				}
				if peer.ID(p.Id) == liar.id {
					addrs = p.Addresses()
				}
			}
			return len(addrs) >= whole
		})
		if !slices.ContainsFunc(addrs, liar.seenAt().Equal) {
			t.Errorf("a peer is named with %v, without the observed %v", addrs, liar.seenAt())
		}
		if honestOne && slices.ContainsFunc(addrs, func(a ma.Multiaddr) bool {
			return strings.HasPrefix(a.String(), "/ip4/11.") || strings.HasPrefix(a.String(), "/ip4/10.")
		}) {
			t.Errorf("an honest peer is named with %v, want none of the liars' addresses", addrs)
		}
	}
	g.goesOn()
	t.Logf("%d peers reported up to %d addresses each", len(liars), len(lies))
	s.end(g)
}

// Packets with forged sources keep nobody out, and the relay is no weapon against these
// sources: it sends at most three times what it received.
func TestAttackSpoofedSources(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	honestNS, attackerNS := l.public("honest", "11.0.0.2/8"), l.public("attacker", "11.0.0.3/8")
	// All forged addresses lead back here, so that packets to them are counted.
	l.in(attackerNS, "ip route add local 11.77.0.0/16 dev lo")
	honest := newCrowdFrom(t, l.sockets(honestNS, "11.0.0.2", 2))
	g := newGroup(t, honest, s.bootstrap)
	target := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("11.0.0.1:4001"))

	// The first packets of real handshakes, each from another address. Each counts as a
	// new connection, because it has its own connection ID.
	initials := capturedInitials(t, sized(600, 10_000))
	received, sent := l.counted(s, "rx_bytes"), l.counted(s, "tx_bytes")
	began, packets := time.Now(), 0
	var newcomers, in int
	for i, initial := range initials {
		ip := fmt.Sprintf("11.77.%d.%d", i/250, 1+i%250)
		conn := l.sockets(attackerNS, ip, 1)[0]
		for range 2 {
			conn.WriteTo(initial, target)
			packets++
		}
		conn.Close()
		if i%(len(initials)/20) == 0 {
			newcomers++
			if honest.getsIn(t, s.bootstrap) {
				in++
			}
		}
	}
	// Now that the rate is high, newcomers have to prove their addresses first.
	retried := l.answeredByRetry(attackerNS, target, initials)
	received, sent = l.counted(s, "rx_bytes")-received, l.counted(s, "tx_bytes")-sent
	t.Logf("%d packets from %d forged addresses in %.1f s: %d KiB received, %d KiB sent, Retry %v, %d of %d newcomers got in",
		packets, len(initials), time.Since(began).Seconds(), received>>10, sent>>10, retried, in, newcomers)
	if in < newcomers {
		t.Errorf("%d of %d newcomers got in", in, newcomers)
	}
	if sent > 3*received {
		t.Errorf("the relay sent %d bytes after it received %d, want at most three times as much", sent, received)
	}
	if !retried {
		t.Error("no Retry although connections begin at a high rate")
	}
	s.end(g)
}

// Handshakes that forged addresses begin and never end, in as many small pieces as fit into
// their packets, take no more memory than is promised, and newcomers get in meanwhile.
func TestAttackInitials(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	honestNS, attackerNS := l.public("honest", "11.0.0.2/8"), l.public("attacker", "11.0.0.3/8")
	l.in(attackerNS, "ip route add local 11.77.0.0/16 dev lo")
	honest := newCrowdFrom(t, l.sockets(honestNS, "11.0.0.2", 2))
	g := newGroup(t, honest, s.bootstrap)
	target := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("11.0.0.1:4001"))
	newcomers, in, sent, highest := 0, 0, 0, int64(0)
	for i := range sized(300, 5000) {
		conn := l.sockets(attackerNS, fmt.Sprintf("11.77.%d.%d", i/250, 1+i%250), 1)[0]
		for packet := range halfHandshake(newConnID(), nil) {
			conn.WriteTo(packet, target)
			sent++
		}
		conn.Close()
		if i%20 == 0 {
			highest = max(highest, s.rss(t))
			newcomers++
			if honest.getsIn(t, s.bootstrap) {
				in++
			}
		}
	}
	t.Logf("%d Initials from forged addresses; the relay had %d MiB; %d of %d newcomers got in", sent, highest>>20, in, newcomers)
	if in < newcomers {
		t.Errorf("%d of %d newcomers got in", in, newcomers)
	}
	s.end(g)
}

// getsIn reports whether a newcomer can connect to the relay, and lets it leave again.
func (c *crowd) getsIn(t *testing.T, relay peer.AddrInfo) bool {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	client, err := c.newcomer(ctx, relay)
	if err != nil {
		t.Logf("newcomer: %v", err)
		return false
	}
	client.CloseWithError(0, "")
	return true
}

// newConnID returns the connection ID with which a client begins.
func newConnID() []byte {
	id := make([]byte, 16)
	rand.Read(id)
	return id
}

// halfHandshake yields Initials of one connection in pieces of a byte, a few more than
// pass the gate. The first byte never comes, so QUIC keeps all others.
func halfHandshake(id, token []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		offset := uint64(1)
		for n := range uint32(handshakeDatagrams + 2) {
			var frames []byte
			for ; len(frames) < 1050 && offset < 16<<10; offset++ { // a handshake has 16 KiB at most
				frames = append(frames, cryptoFrame(offset, []byte{1})...)
			}
			packet, err := initialPacket(id, token, n, frames)
			if err != nil {
				panic(err) // of a cipher that we have
			}
			if !yield(packet) {
				return
			}
		}
	}
}

// The same from addresses that are proven, so that as many are let in as clients.
func TestAttackHandshakes(t *testing.T) {
	s, g, _ := besieged(t, 1)
	target, err := manet.ToNetAddr(s.bootstrap.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		t.Fatal(err)
	}
	var begun, retried atomic.Int64
	inParallel(t, sized(300, siegeClients-20), 128, func(ctx context.Context, i int) error {
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return err
		}
		defer conn.Close()
		id, token := newConnID(), []byte(nil)
		buf := make([]byte, 2048)
		for packet := range halfHandshake(id, nil) {
			// The first byte of the answer tells a Retry (RFC 9000, 17.2.5).
			conn.WriteTo(packet, target)
			conn.SetReadDeadline(time.Now().Add(time.Second))
			if n, err := conn.Read(buf); err == nil && buf[0]&0xf0 == 0xf0 {
				own := 6 + int(buf[5])
				id = slices.Clone(buf[own+1:][:buf[own]])
				token = slices.Clone(buf[own+1+int(buf[own]) : n-16])
				retried.Add(1)
			}
			break
		}
		for packet := range halfHandshake(id, token) {
			conn.WriteTo(packet, target)
		}
		begun.Add(1)
		return nil
	})
	g.goesOn()
	t.Logf("%d handshakes begun, %d with a Retry; the relay has %d MiB", begun.Load(), retried.Load(), s.rss(t)>>20)
	s.end(g)
}

// siege starts the relay in a namespace of the lab, at 11.0.0.1.
func (l *lab) siege(t *testing.T) *siege {
	t.Helper()
	ns := l.public("relay", "11.0.0.1/8")
	// The kernel remembers 1024 neighbours at a time, so the forged addresses are behind
	// one.
	l.in(ns, "ip route add 11.77.0.0/16 via 11.0.0.3")
	cmd := command(t, "--port=4001", "--http-port=4002", fmt.Sprint("--max-clients=", siegeClients))
	cmd.Args = append([]string{"ip", "netns", "exec", ns}, cmd.Args...)
	cmd.Path, _ = exec.LookPath("ip")
	s := besiege(t, cmd)
	s.bootstrap.Addrs = []ma.Multiaddr{ma.StringCast(relayV4)}
	return s
}

// counted returns a counter of the relay's network interface.
func (l *lab) counted(s *siege, name string) int64 {
	l.t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", s.Process.Pid))
	if err != nil {
		l.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "wan:")
	field := map[string]int{"rx_bytes": 0, "tx_bytes": 8}[name]
	n, err := strconv.ParseInt(strings.Fields(rest)[field], 10, 64)
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

// sockets returns n UDP sockets of this process that are bound to ip in ns.
func (l *lab) sockets(ns, ip string, n int) (conns []*net.UDPConn) {
	l.t.Helper()
	err := within(ns, func() error {
		for range n {
			conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(ip), 0)))
			if err != nil {
				return err
			}
			conns = append(conns, conn)
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return conns
}

// within calls do on a thread that is in the namespace ns. What do opens is there.
func within(ns string, do func() error) error {
	done := make(chan error, 1)
	go func() {
		// If the thread cannot return to its namespace, it ends with this goroutine.
		runtime.LockOSThread()
		done <- func() error {
			home, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer home.Close()
			there, err := os.Open("/run/netns/" + ns)
			if err != nil {
				return err
			}
			defer there.Close()
			if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			if err := do(); err != nil {
				return err
			}
			if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
				return err
			}
			runtime.UnlockOSThread()
			return nil
		}()
	}()
	return <-done
}

// Connections to the identity endpoint that come by the thousands from one address take
// none of the answers of a client that is far away.
func TestAttackHTTP(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	g := newGroup(t, newCrowdFrom(t, l.sockets(l.public("group", "11.0.0.2/8"), "11.0.0.2", 1)), s.bootstrap)
	attackers := l.public("attacker", "11.0.0.3/8")
	honest := l.labClient(l.far("honest", 150*time.Millisecond, 0, "11.0.0.4/8"))
	const endpoint = "11.0.0.1:4002"
	ctx, cancel := context.WithCancel(context.Background())
	var opened atomic.Int64
	var attacking sync.WaitGroup
	for range 8 {
		attacking.Go(func() {
			err := within(attackers, func() error {
				held := make([]*net.TCPConn, 400) // together more than the relay keeps
				for i := 0; ctx.Err() == nil; i = (i + 1) % len(held) {
					if held[i] != nil {
						held[i].SetLinger(0) // its port is free again at once
						held[i].Close()
					}
					var err error
					if held[i], err = net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(endpoint))); err != nil {
						return err
					}
					opened.Add(1)
				}
				for _, c := range held {
					if c != nil {
						c.Close()
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "the endpoint is full", func() bool { return opened.Load() > 2*maxHTTPConns })
	before, began := opened.Load(), time.Now()
	for i := range sized(10, 100) {
		if _, err := honest.try(labRequest{Do: "identity", URL: "http://" + endpoint + identityRoute}); err != nil {
			t.Errorf("question %d of an honest client: %v", i, err)
		}
	}
	t.Logf("%.0f connections a second", float64(opened.Load()-before)/time.Since(began).Seconds())
	cancel()
	attacking.Wait()
	s.end(g)
}

// capturedInitials returns the first packets of n handshakes.
func capturedInitials(t *testing.T, n int) (packets [][]byte) {
	t.Helper()
	sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	c := newCrowdOn(t, 1)
	who := newLightIdentity(t)
	tlsConf, _ := who.tls.ConfigForPeer("")
	ctx, cancel := context.WithCancel(context.Background())
	var dialing sync.WaitGroup
	defer dialing.Wait()
	defer cancel()
	for range 32 {
		dialing.Go(func() {
			for ctx.Err() == nil {
				ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
				c.transport().Dial(ctx, sink.LocalAddr(), tlsConf, lightConfig())
				cancel()
			}
		})
	}
	buf := make([]byte, 2048)
	seen := map[string]bool{}
	for len(packets) < n {
		sink.SetReadDeadline(time.Now().Add(testTimeout))
		k, err := sink.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		// An Initial (RFC 9000, 17.2.2), and the first with its destination connection ID.
		if id := string(buf[6 : 6+buf[5]]); buf[0]&0xf0 == 0xc0 && !seen[id] {
			seen[id] = true
			packets = append(packets, slices.Clone(buf[:k]))
		}
	}
	return packets
}

// answeredByRetry sends first packets from one real address, and reports whether a Retry
// comes back (RFC 9000, 17.2.5).
func (l *lab) answeredByRetry(ns string, target net.Addr, initials [][]byte) bool {
	l.t.Helper()
	conn := l.sockets(ns, "11.0.0.3", 1)[0]
	defer conn.Close()
	retry := make(chan bool, 1)
	go func() {
		buf := make([]byte, 2048)
		conn.SetReadDeadline(time.Now().Add(testTimeout))
		for {
			if _, err := conn.Read(buf); err != nil {
				retry <- false
				return
			}
			if buf[0]&0xf0 == 0xf0 {
				retry <- true
				return
			}
		}
	}()
	for _, initial := range initials {
		conn.WriteTo(initial, target)
		select {
		case found := <-retry:
			return found
		case <-time.After(time.Millisecond): // faster, and most packets would be lost
		}
	}
	return <-retry
}
