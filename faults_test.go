package main

// What goes wrong on a real machine and with real or hostile clients: the power
// cord, the full disk, everybody at once, and those who don't play by the rules.

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
)

// A thousand clients come back at once after the relay was killed. None is turned
// away, though one side may time out on a machine that can't keep up.
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
	// join brings everybody in and returns how the relay turned some away.
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
						// A connection that the relay takes is one that it answers on.
						_, err = client.named(ctx, w.id)
					}
					if err == nil {
						return
					}
					if ctx.Err() != nil {
						t.Errorf("not in after %d tries: %v", tries, err)
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
		t.Logf("%s: %d clients in after %.1f s, %.0f a second", round, n, took.Seconds(), n/took.Seconds())
		if len(refused) > 0 {
			t.Errorf("%s: %d were turned away, such as by: %v", round, len(refused), refused[0])
		}
		p.Process.Kill()
		<-p.rest
		p.Cmd.Wait()
		if round == "first start" {
			p = start(t, "--identity="+key, "--port="+port)
		}
	}
}
