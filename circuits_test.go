package main

import (
	"bytes"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"
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
	// The protocol's own messages do not wait in that line.
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
			t.Errorf("circuit %d carried %.2f of a fair share", i, share)
		}
	}
}

// However many wait for the bandwidth: a circuit ends when it is told to.
func TestPacedStreamEndsAtItsDeadline(t *testing.T) {
	h := newPacedHost(nil, minBandwidth)
	s := &pacedStream{Stream: deadlineStream{memoryStream{Reader: bytes.NewReader(make([]byte, 1<<20))}}, host: h}
	h.limiter.ReserveN(time.Now(), h.limiter.Burst()) // as others would
	for range 1000 {
		h.limiter.ReserveN(time.Now(), minTurn)
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

// Circuits that each carry little do not carry more than the cap together.
func TestShortCircuitsKeepTheCap(t *testing.T) {
	const bandwidth, circuits = 1 << 20, 100
	h := newPacedHost(nil, bandwidth)
	began := time.Now()
	for range circuits {
		s := &pacedStream{Stream: deadlineStream{memoryStream{Reader: bytes.NewReader(make([]byte, circuitBuffer))}}, host: h}
		if n, err := s.Read(make([]byte, circuitBuffer)); n != circuitBuffer || err != nil {
			t.Fatalf("Read = %d, %v", n, err)
		}
	}
	least := time.Duration(circuits*circuitBuffer-h.limiter.Burst())*time.Second/bandwidth - 2*turnTime
	if took := time.Since(began); took < least {
		t.Errorf("%d circuits carried %d bytes in %v, want at least %v", circuits, circuits*circuitBuffer, took, least)
	}
}

type deadlineStream struct{ memoryStream }

func (deadlineStream) SetDeadline(time.Time) error { return nil }
