package main

// --max-bandwidth: one cap on what all circuits carry together, shared fairly.
// go-libp2p's relay copies by itself, so its streams are paced underneath it.

import (
	"context"
	"os"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"golang.org/x/time/rate"
)

// maxCircuitMessage is the longest message of the circuit protocol, in bytes, in
// go-libp2p. Whatever is read into more room than that is payload.
const maxCircuitMessage = 4096

// pacedHost is the host that the circuit relay is given: it paces what is read
// from the streams of circuits, and leaves the protocol's own messages alone.
//
// Each circuit waits for one chunk at a time, and rate.Limiter serves those who
// wait in the order in which they came: so all that have something to carry get
// the same share.
type pacedHost struct {
	host.Host
	limiter *rate.Limiter
	chunk   int // bytes per wait
}

// newPacedHost shares bandwidth, in bytes per second, among all circuits.
func newPacedHost(h host.Host, bandwidth int64) pacedHost {
	// A twentieth of a second each, but neither so little that waiting is all the
	// work, nor more than a circuit's buffer.
	chunk := int(min(max(bandwidth/20, maxCircuitMessage/4), circuitBuffer))
	// What a busy machine oversleeps is caught up with: up to a tenth of a second.
	burst := int(min(max(bandwidth/10, int64(chunk)), 1<<30))
	return pacedHost{h, rate.NewLimiter(rate.Limit(bandwidth), burst), chunk}
}

func (h pacedHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) { handle(h.pace(s)) })
}

func (h pacedHost) NewStream(ctx context.Context, id peer.ID, protocols ...protocol.ID) (network.Stream, error) {
	s, err := h.Host.NewStream(ctx, id, protocols...)
	if err != nil {
		return nil, err
	}
	return h.pace(s), nil
}

func (h pacedHost) pace(s network.Stream) network.Stream {
	return &pacedStream{Stream: s, host: h}
}

type pacedStream struct {
	network.Stream
	host     pacedHost
	deadline atomic.Int64 // for reads, in Unix nanoseconds; 0: none
}

// Read waits after it has read, so that the other end is held up by QUIC's flow
// control, and not longer than the stream's deadline allows.
func (s *pacedStream) Read(p []byte) (int, error) {
	if len(p) <= maxCircuitMessage {
		return s.Stream.Read(p)
	}
	n, err := s.Stream.Read(p[:min(len(p), s.host.chunk)])
	if n == 0 {
		return n, err
	}
	wait := s.host.limiter.ReserveN(time.Now(), n).Delay()
	if at := s.deadline.Load(); at != 0 {
		if left := time.Until(time.Unix(0, at)); left < wait {
			time.Sleep(left)
			return 0, os.ErrDeadlineExceeded
		}
	}
	time.Sleep(wait)
	return n, err
}

func (s *pacedStream) SetDeadline(t time.Time) error {
	s.keep(t)
	return s.Stream.SetDeadline(t)
}

func (s *pacedStream) SetReadDeadline(t time.Time) error {
	s.keep(t)
	return s.Stream.SetReadDeadline(t)
}

func (s *pacedStream) keep(t time.Time) {
	at := int64(0)
	if !t.IsZero() {
		at = t.UnixNano()
	}
	s.deadline.Store(at)
}
