package main

// Whether a libp2p host leaves anything behind.

import (
	"crypto/rand"
	"runtime"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/transport"
)

// A monitor that runs check each minute would pile up what a host leaves behind
// when one of its parts fails.
func TestHostThatFailsLeavesNothingBehind(t *testing.T) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	before := runtime.NumGoroutine()
	for range 20 {
		resources := &closedResources{}
		if h, err := newQUICHost(hostParts{key: key, transport: noProtocols{}, resources: resources, observe: true}); err == nil {
			h.Close()
			t.Fatal("a host without a protocol was made")
		}
		if !resources.closed {
			t.Fatal("the resource manager was left open")
		}
	}
	eventually(t, "its goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
}

// closedResources remembers that it was closed.
type closedResources struct {
	network.NullResourceManager
	closed bool
}

func (r *closedResources) Close() error {
	r.closed = true
	return nil
}

// noProtocols is a transport that no swarm accepts.
type noProtocols struct{ transport.Transport }

func (noProtocols) Protocols() []int { return nil }
