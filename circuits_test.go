package main

// Circuits: how they share --max-bandwidth, and that it holds.

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/encoding/protodelim"
)

// One user's large sync must not take the bandwidth from everybody else's.
func TestCircuitsShareTheBandwidth(t *testing.T) {
	const circuits, total = 8, 8 << 20
	r := newTestRelay(t, defaultConfig(t, "--max-bandwidth=4MiB"))
	c := newCrowdOn(t, 4)
	var late *lightClient
	var links []link
	for range circuits {
		a, b := c.pair(testContext(t), t, r, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
		from, to, err := a.circuitTo(testContext(t), b)
		if err != nil {
			t.Fatal(err)
		}
		unlimited(from, to)
		links = append(links, link{from, to})
		late = a
	}
	got := make([]atomic.Int64, circuits)
	for i, l := range links {
		go l.flood(&got[i], 0) // until the relay is closed
	}
	sum := func() (n int64) {
		for i := range got {
			n += got[i].Load()
		}
		return n
	}
	eventually(t, "the circuits carry something", func() bool { return sum() > 1<<20 })
	// The protocol's own messages do not wait behind payload.
	if err := late.reserve(testContext(t)); err != nil {
		t.Errorf("reservation while all circuits are busy: %v", err)
	}
	began, before := make([]int64, circuits), sum()
	for i := range got {
		began[i] = got[i].Load()
	}
	eventually(t, "the circuits carry more", func() bool { return sum()-before > total })
	for i := range got {
		share := float64(got[i].Load()-began[i]) * circuits / float64(sum()-before)
		if share < 0.5 || share > 2 {
			t.Errorf("circuit %d carried %.2f times a fair share", i, share)
		}
	}
}

// A circuit ends at its deadline, however many others wait for the bandwidth.
func TestPacedStreamEndsAtItsDeadline(t *testing.T) {
	h := newPacedHost(nil, newBandwidth(minBandwidth))
	s := &pacedStream{Stream: deadlineStream{memoryStream{Reader: bytes.NewReader(make([]byte, 1<<20))}}, host: h}
	h.bandwidth.ReserveN(time.Now(), h.bandwidth.Burst()) // as other circuits would
	for range 1000 {
		h.bandwidth.ReserveN(time.Now(), minTurn)
	}
	s.SetDeadline(time.Now().Add(10 * time.Millisecond))
	if n, err := s.Read(make([]byte, circuitBuffer)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read = %d, %v, want %v", n, err, os.ErrDeadlineExceeded)
	}
	// Short reads are the protocol's messages.
	if n, err := s.Read(make([]byte, maxCircuitMessage)); n != maxCircuitMessage || err != nil {
		t.Errorf("Read = %d, %v, want a message at once", n, err)
	}
}

// Many circuits that each carry little stay within the cap together.
func TestShortCircuitsKeepTheCap(t *testing.T) {
	const bandwidth, circuits = 1 << 20, 100
	h := newPacedHost(nil, newBandwidth(bandwidth))
	began := time.Now()
	for range circuits {
		s := &pacedStream{Stream: deadlineStream{memoryStream{Reader: bytes.NewReader(make([]byte, circuitBuffer))}}, host: h}
		if n, err := s.Read(make([]byte, circuitBuffer)); n != circuitBuffer || err != nil {
			t.Fatalf("Read = %d, %v", n, err)
		}
	}
	least := time.Duration(circuits*circuitBuffer-h.bandwidth.Burst())*time.Second/bandwidth - 2*turnTime
	if took := time.Since(began); took < least {
		t.Errorf("%d circuits carried %d bytes in %v, want at least %v", circuits, circuits*circuitBuffer, took, least)
	}
}

type deadlineStream struct{ memoryStream }

func (deadlineStream) SetDeadline(time.Time) error { return nil }

// An operator who wonders why streams fail looks at this count.
func TestStreamsRefusedForFairnessAreCounted(t *testing.T) {
	manager, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(rcmgr.InfiniteLimits))
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	counts := new(tally)
	f := newFairStreams(manager, 0, counts)
	id := newTestPeerID(t)
	for range streamShare {
		s, err := f.OpenStream(id, network.DirInbound)
		if err != nil {
			t.Fatalf("a stream within its share: %v", err)
		}
		defer s.Done()
	}
	if s, err := f.OpenStream(id, network.DirInbound); err == nil {
		s.Done()
		t.Error("a stream above its share was opened")
	}
	if n := counts.refused[refusedStream].Load(); n != 1 {
		t.Errorf("%d refused streams were counted, want 1", n)
	}
}

// The log and the README say how many circuits can be open at once. The one that is
// too many is refused, and those that are open go on.
func TestCircuitsEndAtTheirBound(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	r.circuits.most = 2 // nobody has asked for one yet
	c := newCrowd(t, 4)
	a, b := c.pair(testContext(t), t, r, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
	for range r.circuits.most {
		if _, _, err := a.circuitTo(testContext(t), b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.circuit(testContext(t), b.id); err == nil {
		t.Errorf("circuit %d was opened", r.circuits.most+1)
	}
	if n := r.tally.refused[refusedCircuit].Load(); n != 1 {
		t.Errorf("%d refused circuits were counted, want 1", n)
	}
	if _, open := r.circuits.counts(); open != r.circuits.most {
		t.Errorf("%d circuits are open, want %d", open, r.circuits.most)
	}
}

// A device can reach as many others as it is promised, over its one connection, be
// reached by as many, and still ask the DHT.
func TestOneConnectionHoldsAllCircuitsOfADevice(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newCrowd(t, circuitsPerPeer+2)
	a, b := c.pair(testContext(t), t, r, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
	if err := a.reserve(testContext(t)); err != nil {
		t.Fatal(err)
	}
	mates := joinCrowd(t, r, circuitsPerPeer/circuitsPerPair)
	a.acceptAll()
	for i := range circuitsPerPeer {
		mate := mates[i/circuitsPerPair]
		if err := mate.reserve(testContext(t)); err != nil {
			t.Fatal(err)
		}
		mate.acceptAll()
		if _, err := a.circuit(testContext(t), mate.id); err != nil {
			t.Fatalf("circuit %d of %d: %v", i+1, circuitsPerPeer, err)
		}
		if _, err := mate.circuit(testContext(t), a.id); err != nil {
			t.Fatalf("circuit %d of %d to it: %v", i+1, circuitsPerPeer, err)
		}
	}
	if _, err := b.circuit(testContext(t), a.id); err == nil {
		t.Errorf("circuit %d to one device was opened", circuitsPerPeer+1)
	}
	a.mustAsk(t, findMessage([]byte(b.id)))
}

// acceptAll takes every circuit that the relay offers, until the connection ends.
func (c *lightClient) acceptAll() {
	go func() {
		for c.Context().Err() == nil {
			c.accept(c.Context())
		}
	}()
}

// A stranger takes some circuits of a device that he has chosen, and its mate gets one
// all the same: one identity has its bound, and so has one network.
func TestStrangerLeavesCircuitsToTheMate(t *testing.T) {
	lim := newLimits(100, 256)
	lim.testOnlyLimitLoopback = true
	r := newTestRelayWithin(t, lim, defaultConfig(t), newTestKey(t))
	homes, away := loopbackCrowd(t, "127.0.0.2", 1), loopbackCrowd(t, "127.0.0.3", 1)
	victim := homes.join(t, r, newLightIdentity(t))
	if err := victim.reserve(testContext(t)); err != nil {
		t.Fatal(err)
	}
	victim.acceptAll()
	mate := homes.join(t, r, newLightIdentity(t))
	opened := 0
	for range 5 {
		stranger := away.join(t, r, newLightIdentity(t))
		for range 2 * circuitsPerPair {
			if _, err := stranger.circuit(testContext(t), victim.id); err == nil {
				opened++
			}
		}
		if opened%circuitsPerPair != 0 {
			t.Errorf("devices opened %d circuits to another, want %d each", opened, circuitsPerPair)
		}
	}
	if opened != circuitsPerNetwork {
		t.Errorf("one network opened %d circuits to a device, want %d", opened, circuitsPerNetwork)
	}
	from, err := mate.circuit(testContext(t), victim.id)
	if err != nil {
		t.Fatalf("the mate's circuit: %v", err)
	}
	// And once it is over, nothing of it counts any more.
	from.CancelRead(0)
	from.CancelWrite(0)
	eventually(t, "the mate's circuit is over", func() bool {
		r.circuits.mu.Lock()
		defer r.circuits.mu.Unlock()
		return r.circuits.parts[circuitPart{from: mate.id, to: victim.id}] == 0
	})
	if n := r.tally.refused[refusedCircuit].Load(); n != 5*2*circuitsPerPair-circuitsPerNetwork {
		t.Errorf("%d refused circuits were counted, want %d", n, 5*2*circuitsPerPair-circuitsPerNetwork)
	}
}

// What a client sends in place of a request reaches the relay service as it came.
func TestHopRequestIsReadWhole(t *testing.T) {
	to := newTestPeerID(t)
	message := func(kind circuitpb.HopMessage_Type, id []byte) []byte {
		var b bytes.Buffer
		protodelim.MarshalTo(&b, &circuitpb.HopMessage{Type: &kind, Peer: &circuitpb.Peer{Id: id}})
		return b.Bytes()
	}
	connect := message(circuitpb.HopMessage_CONNECT, []byte(to))
	tests := []struct {
		name     string
		in, read []byte
		to       peer.ID
	}{
		{"a circuit", append(slices.Clone(connect), "more"...), connect, to},
		{"no peer", message(circuitpb.HopMessage_CONNECT, []byte("?")), message(circuitpb.HopMessage_CONNECT, []byte("?")), ""},
		{"a reservation", message(circuitpb.HopMessage_RESERVE, nil), message(circuitpb.HopMessage_RESERVE, nil), ""},
		{"cut off", connect[:len(connect)-1], connect[:len(connect)-1], ""},
		{"nothing", nil, nil, ""},
		{"too long", []byte{0x81, 0x20, 1, 2}, []byte{0x81, 0x20}, ""},
		{"no length", []byte{0xff, 0xff, 0xff, 0xff}, []byte{0xff, 0xff, 0xff}, ""},
	}
	for _, tt := range tests {
		read, id, err := readHopRequest(bytes.NewReader(tt.in))
		if err != nil && err != io.EOF {
			t.Errorf("%s: %v", tt.name, err)
		}
		if !bytes.Equal(read, tt.read) || id != tt.to {
			t.Errorf("%s: readHopRequest(%x) = %x, %q, want %x, %q", tt.name, tt.in, read, id, tt.read, tt.to)
		}
	}
}

// The circuits that strangers open to a device leave it its own streams, and its share
// of memory is its own while others have taken all that is shared.
func TestShareIsNobodyElses(t *testing.T) {
	lim := limits{clients: 1, perNetwork: 256}
	manager, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(lim.resourceLimits(1)))
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	f := newFairStreams(manager, 0, new(tally))
	device := newTestPeerID(t)
	for range int(lim.shared()/peerMemory) + 1 {
		greedy, err := manager.OpenConnection(network.DirOutbound, false, ma.StringCast("/ip4/11.0.0.1/udp/1/quic-v1"))
		if err != nil {
			t.Fatal(err)
		}
		defer greedy.Done()
		if err := greedy.SetPeer(newTestPeerID(t)); err != nil {
			t.Fatal(err)
		}
		for size := 1 << 20; size > 0; size /= 2 {
			for greedy.ReserveMemory(size, network.ReservationPriorityAlways) == nil {
			}
		}
	}
	var open []network.StreamManagementScope
	for dir, n := range map[network.Direction]int{network.DirInbound: streamShare, network.DirOutbound: streamShareTo} {
		for range n {
			s, err := f.OpenStream(device, dir)
			if err != nil {
				t.Fatalf("%v stream within its share: %v", dir, err)
			}
			open = append(open, s)
		}
		if s, err := f.OpenStream(device, dir); err == nil {
			t.Errorf("%v stream above its share was opened", dir)
			s.Done()
		}
	}
	last := open[len(open)-1]
	if last.Stat().Memory != 0 {
		t.Errorf("a stream within its peer's share takes %d bytes of what is shared", last.Stat().Memory)
	}
	for _, s := range open {
		s.Done()
	}
	if len(f.used) != 0 {
		t.Errorf("%d peers have something of their share in use, want none", len(f.used))
	}
	s, err := f.OpenStream(device, network.DirOutbound)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Done()
	if err := s.ReserveMemory(identifyMemory, network.ReservationPriorityAlways); err != nil {
		t.Errorf("room for identify: %v", err)
	}
	if err := s.ReserveMemory(1, network.ReservationPriorityAlways); err == nil {
		t.Error("more than the share was given while nothing is left")
	}
}
