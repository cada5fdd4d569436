package main

// More than one relay: whether their clients meet, and whether they still do when one
// relay is gone.

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
)

func (r testRelay) bootstrapFlag() string {
	return fmt.Sprintf("--bootstrap=%s/p2p/%s", r.info.Addrs[0], r.info.ID)
}

// plannedRelay is a relay that others can name before it starts.
type plannedRelay struct {
	key   ed25519.PrivateKey
	port  int
	named []*plannedRelay // by its operator
}

// planRelays returns n relays that name nobody yet.
func planRelays(t testing.TB, n int) []*plannedRelay {
	t.Helper()
	planned := make([]*plannedRelay, n)
	for i := range planned {
		planned[i] = &plannedRelay{key: newTestKey(t), port: freeUDPPort(t)}
	}
	return planned
}

// freeUDPPort returns a port that is free, and below those that systems give to whoever
// asks for any, as freeTCPPort does.
func freeUDPPort(t testing.TB) int {
	t.Helper()
	var err error
	for range 100 {
		port := 10000 + rand.IntN(20000)
		var conn net.PacketConn
		if conn, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port)); err == nil {
			conn.Close()
			return port
		}
	}
	t.Fatal(err)
	return 0
}

// start starts the relay, again if it was closed.
func (p *plannedRelay) start(t testing.TB) testRelay {
	t.Helper()
	var flags []string
	for _, other := range p.named {
		flags = append(flags, fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s", other.port, peerIDOf(t, other.key)))
	}
	cfg := defaultConfig(t, flags...)
	cfg.port = p.port
	return newTestRelayWithin(t, newLimits(0, 256), cfg, p.key)
}

// newRing starts n relays. Each names the next, and the last names the first.
func newRing(t testing.TB, n int) []testRelay {
	t.Helper()
	planned, ring := planRelays(t, n), make([]testRelay, n)
	for i, p := range planned {
		p.named = []*plannedRelay{planned[(i+1)%n]}
	}
	for i, p := range planned {
		ring[i] = p.start(t)
	}
	waitMesh(t, ring)
	return ring
}

// meshTimeout is how long relays have to find each other: two that have lost each other
// may both wait for maxRetry, and a quarter more.
const meshTimeout = 2*maxRetry + testTimeout

// waitMesh waits until each of relays is connected to all others, and knows no further
// ones that are connected.
func waitMesh(t testing.TB, relays []testRelay) {
	t.Helper()
	for i, r := range relays {
		eventuallyWithin(t, meshTimeout, fmt.Sprintf("relay %d is connected to all others", i), func() bool {
			_, connected := r.federation.counts()
			return connected == len(relays)-1
		})
	}
}

func (r testRelay) waitConnected(t testing.TB, id peer.ID) {
	t.Helper()
	eventually(t, "the other relay is connected", func() bool {
		return r.federation.get(id) != nil && r.host.Network().Connectedness(id) == network.Connected
	})
}

// walker is a client that also asks the relays that answers name, and again those that it
// has met, as the deployed clients do. It has a socket of its own.
type walker struct {
	lightIdentity
	transport *quicgo.Transport
	at        ma.Multiaddr  // the address of its socket
	home      peer.AddrInfo // the relay that it knows from the start
	key       []byte        // its group's

	met   []peer.AddrInfo // the relays that it has been connected to
	conns map[peer.ID]*lightClient
}

func (c *crowd) walker(t testing.TB, home testRelay, key []byte) *walker {
	t.Helper()
	tr := c.transport()
	at, err := quicreuse.ToQuicMultiaddr(tr.Conn.LocalAddr(), quicgo.Version1)
	if err != nil {
		t.Fatal(err)
	}
	return &walker{newLightIdentity(t), tr, at, home.info, key, nil, make(map[peer.ID]*lightClient)}
}

// walk sends req to the relays that the walker knows and to every one that an answer
// names, and calls each with the answers. Relays that are not in alive are not dialled,
// which would only take its time, nor are other clients. It fails if any of alive that it
// comes to does not answer.
func (w *walker) walk(ctx context.Context, req *kadpb.Message, alive []testRelay, each func(*lightClient, *kadpb.Message) error) (err error) {
	next, seen := append([]peer.AddrInfo{w.home}, w.met...), make(map[peer.ID]bool)
	for ; len(next) > 0; next = next[1:] {
		info := next[0]
		if seen[info.ID] || !slices.ContainsFunc(alive, func(r testRelay) bool { return r.info.ID == info.ID }) {
			continue
		}
		seen[info.ID] = true
		resp, askErr := w.ask(ctx, info, req, each)
		for tries := 1; askErr != nil && tries < 4 && ctx.Err() == nil; tries++ {
			// The connection had ended unnoticed, or the machine is busy.
			resp, askErr = w.ask(ctx, info, req, each)
		}
		if askErr != nil {
			err = fmt.Errorf("%v: %w", req.Type, askErr)
			continue
		}
		for _, p := range resp.CloserPeers {
			next = append(next, kadpb.PBPeerToPeerInfo(p))
		}
	}
	return err
}

// ask sends req to a relay, to which it connects if it is not connected, and calls each
// with the answer. After a failure the next call connects anew.
func (w *walker) ask(ctx context.Context, relay peer.AddrInfo, req *kadpb.Message, each func(*lightClient, *kadpb.Message) error) (*kadpb.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, testTimeout/4) // so that there is time for another try
	defer cancel()
	c := w.conns[relay.ID]
	if c == nil || c.Context().Err() != nil {
		who := w.lightIdentity
		who.sees, who.patient = relay.Addrs[0], true
		var err error
		if c, err = who.dial(ctx, w.transport, relay); err != nil {
			return nil, err
		}
		if w.conns[relay.ID] == nil {
			w.met = append(w.met, relay)
		}
		w.conns[relay.ID] = c
	}
	resp, err := c.ask(ctx, req)
	if err == nil {
		err = each(c, resp)
	}
	if err != nil {
		c.CloseWithError(0, "")
	}
	return resp, err
}

// publish stores the walker's record wherever a walk to the key arrives.
func (w *walker) publish(ctx context.Context, alive []testRelay) error {
	put := putMessage(w.key, w.id)
	return w.walk(ctx, findMessage(w.key), alive, func(c *lightClient, _ *kadpb.Message) error {
		_, err := c.ask(ctx, put)
		return err
	})
}

// sight is a peer that an answer names.
type sight struct {
	id    peer.ID
	via   *lightClient // the connection over which the walker was told
	addrs []ma.Multiaddr
}

// look returns the peers that the answers of a walk to the key name. It returns none if
// there is no record, without which the deployed clients do not know their mates.
func (w *walker) look(ctx context.Context, alive []testRelay) (sights []sight, err error) {
	record := false
	err = w.walk(ctx, getMessage(w.key), alive, func(c *lightClient, answer *kadpb.Message) error {
		extras, err := readExtras(answer.GetRecord())
		record = record || err == nil && extras.publisher != ""
		for _, p := range answer.CloserPeers {
			sights = append(sights, sight{peer.ID(p.Id), c, p.Addresses()})
		}
		return nil
	})
	if !record {
		return nil, err
	}
	return sights, err
}

// finds reports whether sights has mate, with the address of its socket.
func finds(sights []sight, mate *walker) bool {
	return slices.ContainsFunc(sights, func(s sight) bool {
		return s.id == mate.id && slices.ContainsFunc(s.addrs, mate.at.Equal)
	})
}

// Relays find each other whichever starts first, and again after they have lost each
// other.
func TestRelaysFindOneAnotherAgain(t *testing.T) {
	key := newTestKey(t)
	cfg := defaultConfig(t)
	cfg.port = freeUDPPort(t)
	id := peerIDOf(t, key)
	here := newTestRelay(t, defaultConfig(t, fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s", cfg.port, id)))
	seeker := newCrowd(t, 1).join(t, here, newLightIdentity(t))
	if named := seeker.mustAsk(t, findMessage(newGroupKey())); len(named) > 0 {
		t.Errorf("%v is named although the other relay is down", named)
	}
	for _, lost := range []bool{true, false} {
		there := newTestRelayWithin(t, newLimits(0, 256), cfg, key)
		here.waitConnected(t, there.info.ID)
		if lost {
			if err := here.host.Network().ClosePeer(there.info.ID); err != nil {
				t.Fatal(err)
			}
			here.waitConnected(t, there.info.ID)
		}
		if named := seeker.mustAsk(t, findMessage(newGroupKey())); len(named) != 1 {
			t.Errorf("%v is named, want the other relay", named)
		}
		if err := there.close(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "its absence is noticed", func() bool { return here.host.Network().Connectedness(there.info.ID) != network.Connected })
	}
}

// An operator who adds a relay changes two lines: its own, and one of any other relay. Then
// all know it. And nobody else gets in: not by asking, nor by naming others.
func TestOneNameLeadsToAllRelays(t *testing.T) {
	planned := planRelays(t, 5)
	planned[0].named, planned[1].named = planned[1:2], planned[2:3] // a chain: each is named by the one before
	planned[2].named, planned[3].named = planned[3:4], planned[0:1] // and the last knows the first
	stranger := planned[4]
	stranger.named = planned[0:1]
	var relays []testRelay
	for _, p := range planned[:4] {
		relays = append(relays, p.start(t))
	}
	waitMesh(t, relays)
	outside := stranger.start(t)
	for _, r := range relays {
		outside.waitConnected(t, r.info.ID)
	}
	if c := relays[0].counters(); c.relays != 3 || c.relaysConnected != 3 {
		t.Errorf("%d of %d other relays are counted as connected, want 3 of 3", c.relaysConnected, c.relays)
	}
	client := newCrowd(t, 1).join(t, relays[0], newLightIdentity(t))
	for range 20 {
		if named := client.mustAsk(t, getMessage(newGroupKey())); named[outside.info.ID] != nil {
			t.Error("a client is told of a relay that no operator named")
		}
	}
	for i, r := range relays {
		if r.federation.get(outside.info.ID) != nil {
			t.Errorf("relay %d takes a stranger for a relay", i)
		}
	}

	// An operator takes a name back.
	relays[1].close()
	planned[1].named = planned[0:1]
	relays[1] = planned[1].start(t)
	eventually(t, "the first two relays know none but each other", func() bool {
		return relays[0].federation.get(relays[2].info.ID) == nil && relays[0].federation.get(relays[3].info.ID) == nil &&
			relays[1].federation.get(relays[0].info.ID) != nil && relays[1].federation.get(relays[2].info.ID) == nil
	})
}

// vouching is a peer that poses as a relay, and vouches for others as it likes.
type vouching struct {
	host.Host
	text chan string // what it says to the next one that asks
}

func newVouching(t testing.TB) *vouching {
	t.Helper()
	v := &vouching{newClient(t), make(chan string)}
	done := make(chan struct{})
	t.Cleanup(func() { close(done) })
	v.SetStreamHandler(vouchProtocol, func(s network.Stream) {
		defer s.Close()
		select {
		case text := <-v.text:
			io.WriteString(s, text)
		case <-done:
		}
	})
	return v
}

// A relay that is to stop does not wait until another one answers. It would tell its
// clients too late, and look as if it had failed.
func TestStopEndsAQuestionToAnotherRelay(t *testing.T) {
	silent := newClient(t)
	silent.SetStreamHandler(vouchProtocol, func(network.Stream) {})
	r := newTestRelay(t, defaultConfig(t, fmt.Sprintf("--bootstrap=%s/p2p/%s", silent.Addrs()[0], silent.ID())))
	waiting := func(questions int) func() bool {
		return func() bool {
			n := 0
			for _, c := range r.host.Network().ConnsToPeer(silent.ID()) {
				for _, s := range c.GetStreams() {
					if s.Protocol() == vouchProtocol {
						n++
					}
				}
			}
			return n == questions
		}
	}
	eventually(t, "the relay has asked when it connected", waiting(1))
	ctx, stop := context.WithCancel(testContext(t))
	ended := make(chan error, 1)
	go func() {
		_, err := r.federation.read(ctx, silent.ID())
		ended <- err
	}()
	eventually(t, "the relay has asked again", waiting(2))
	stop()
	if err := <-ended; err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the question ended with %v, want that it ends when the relay stops", err)
	}
}

// A relay that vouches for others at a victim's address, and for others again each time
// that it is asked, does not make this one send much there.
func TestRelayDialsFewWhomOthersVouchFor(t *testing.T) {
	victim, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var dials atomic.Int64
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf, seen := make([]byte, 2048), make(map[string]bool)
		for {
			n, err := victim.Read(buf)
			if err != nil {
				return
			}
			if id, ok := handshakeID(buf[:n]); ok && !seen[string(id)] {
				seen[string(id)] = true
				dials.Add(1)
			}
		}
	}()
	defer func() {
		victim.Close()
		<-read
	}()
	v := newVouching(t)
	began := time.Now()
	r := newTestRelay(t, defaultConfig(t, fmt.Sprintf("--bootstrap=%s/p2p/%s", v.Addrs()[0], v.ID())))
	r.waitConnected(t, v.ID())
	v.text <- "" // to the question that came with the connection
	const lists = 10
	for range lists {
		var text strings.Builder
		for range maxRelays - 2 {
			fmt.Fprintf(&text, "/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s\n", victim.LocalAddr().(*net.UDPAddr).Port, newTestPeerID(t))
		}
		go func() { v.text <- text.String() }()
		if err := r.federation.ask(testContext(t), v.ID()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "those of the first list are dialled", func() bool { return dials.Load() >= maxRelays-2 })
	}
	n, most := dials.Load(), maxRelays+vouchedDials*time.Since(began).Seconds()+1
	t.Logf("%d of %d were dialled", n, lists*(maxRelays-2))
	if float64(n) > most {
		t.Errorf("%d were dialled, want at most %.0f", n, most)
	}
}

// What a named relay says is bounded, and nonsense changes nothing.
func TestRelayBoundsWhomOthersVouchFor(t *testing.T) {
	v := newVouching(t)
	r := newTestRelay(t, defaultConfig(t, fmt.Sprintf("--bootstrap=%s/p2p/%s", v.Addrs()[0], v.ID())))
	r.waitConnected(t, v.ID())
	line := func() string { return fmt.Sprintf("/ip4/127.0.0.1/udp/9/quic-v1/p2p/%s\n", newTestPeerID(t)) }
	say := func(text string) error {
		go func() { v.text <- text }()
		return r.federation.ask(testContext(t), v.ID())
	}
	v.text <- "" // to the question that came with the connection

	good := line()
	if err := say(good + good + fmt.Sprintf("/ip4/127.0.0.1/udp/9/quic-v1/p2p/%s\n", r.info.ID)); err != nil {
		t.Fatal(err)
	}
	if known, _ := r.federation.counts(); known != 2 || r.federation.get(r.info.ID) != nil {
		t.Errorf("the relay knows %d others, want the one that is named, the one that this vouches for, and not itself", known)
	}
	for _, bad := range []string{
		"nonsense", line() + "/ip4/127.0.0.1/udp/9/quic-v1", line() + "/ip4/0.0.0.0/udp/9/quic-v1/p2p/" + v.ID().String(),
		line() + "/ip4/127.0.0.1/tcp/9/p2p/" + v.ID().String(), strings.Repeat(good, maxVouched/len(good)+1),
	} {
		if err := say(bad); err == nil {
			t.Errorf("an answer of %d bytes that begins with %.60q was taken", len(bad), bad)
		}
	}
	if known, _ := r.federation.counts(); known != 2 {
		t.Errorf("after bad answers the relay knows %d others, want 2 as before", known)
	}
	var many strings.Builder
	for range 2 * maxRelays {
		many.WriteString(line())
	}
	if err := say(many.String()); err != nil {
		t.Fatal(err)
	}
	if known, _ := r.federation.counts(); known != maxRelays || r.federation.get(v.ID()) == nil {
		t.Errorf("the relay knows %d others, want %d with the one that the operator named", known, maxRelays)
	}
	if err := say(""); err != nil {
		t.Fatal(err)
	}
	if known, _ := r.federation.counts(); known != 1 {
		t.Errorf("the relay knows %d others, want the one that the operator named", known)
	}
}

// The relay dials what the operator wrote: a name has to be looked up each time, but
// the swarm replaces it in the list that it is given.
func TestBootstrapAddressesStayAsWritten(t *testing.T) {
	there := newTestRelay(t, defaultConfig(t))
	port := listenPort(there.relay)
	var flags []string
	for _, addr := range []string{"/dns4/localhost/udp/", "/ip4/127.0.0.1/udp/", "/dns/localhost/udp/"} {
		flags = append(flags, fmt.Sprintf("--bootstrap=%s%s/quic-v1/p2p/%s", addr, port, there.info.ID))
	}
	here := newTestRelay(t, defaultConfig(t, flags...))
	here.waitConnected(t, there.info.ID)
	for i, addr := range strs(here.federation.get(there.info.ID).addrs) {
		if got := fmt.Sprintf("--bootstrap=%s/p2p/%s", addr, there.info.ID); got != flags[i] {
			t.Errorf("the operator wrote %s, the relay keeps %s", flags[i], got)
		}
	}
}

// A relay that names others dials only those.
func TestRelayDialsOtherRelaysAlone(t *testing.T) {
	there := newTestRelay(t, defaultConfig(t))
	here := newTestRelay(t, defaultConfig(t, there.bootstrapFlag()))
	here.waitConnected(t, there.info.ID)
	victim := newClient(t)
	here.host.Peerstore().AddAddrs(victim.ID(), victim.Addrs(), peerstore.PermanentAddrTTL)
	if err := here.host.Connect(testContext(t), peer.AddrInfo{ID: victim.ID(), Addrs: victim.Addrs()}); err == nil {
		t.Error("the relay dialled a client")
	}
	own := newTestKey(t)
	flag := fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/1/quic-v1/p2p/%s", peerIDOf(t, own))
	if _, err := startRelay(defaultConfig(t, flag), own, nil); err == nil {
		t.Error("a relay was allowed to name itself")
	}
}

// A relay whose name has an address that does not answer is the everyday case, such
// as an IPv6 address behind a firewall. Its other address must be tried meanwhile.
func TestSilentAddressDoesNotKeepARelayAway(t *testing.T) {
	silent, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	there := newTestRelay(t, defaultConfig(t))
	here := newTestRelay(t, defaultConfig(t,
		fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s", silent.LocalAddr().(*net.UDPAddr).Port, there.info.ID),
		there.bootstrapFlag()))
	here.waitConnected(t, there.info.ID)
}

// What it costs to find the relays that keep a record, among as many as there can be.
func BenchmarkKeepers(b *testing.B) {
	r := newTestRelay(b, defaultConfig(b))
	others := make(map[peer.ID]*otherRelay)
	for _, c := range joinCrowd(b, r, maxRelays) { // which are connected
		others[c.id] = new(otherRelay)
	}
	r.federation.others.Store(&others)
	key := newGroupKey()
	for b.Loop() {
		r.federation.keepers(key)
	}
}
