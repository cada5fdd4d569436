package main

// Circuits: how they share --max-bandwidth, and that it holds.

import (
	"bytes"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
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
	f := fairStreams{manager, 0, counts}
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

// A device can reach as many others as it is promised, over its one connection, and
// still ask the DHT.
func TestOneConnectionHoldsAllCircuitsOfADevice(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	a, b := newCrowd(t, 2).pair(testContext(t), t, r, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
	for i := range circuitsPerPeer {
		if _, _, err := a.circuitTo(testContext(t), b); err != nil {
			t.Fatalf("circuit %d of %d: %v", i+1, circuitsPerPeer, err)
		}
	}
	a.mustAsk(t, findMessage([]byte(b.id)))
}
