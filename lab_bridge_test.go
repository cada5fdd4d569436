package main

// What the bridge costs and how fast it is, beside a circuit and a direct link between
// the same clients, in turns:
//
//	go test -run '^$' -bench Bridge -benchtime 1x -timeout 1h .
//
// prints one table. It needs Linux. As for Capacity, nothing is asserted, and ratios
// are of one run.

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// overBridge connects a to b over the bridge. Both say under which address they see
// the relay.
func overBridge(ctx context.Context, a, b *lightClient) (link, error) {
	key := newGroupKey()
	for _, c := range []*lightClient{a, b} {
		if _, err := c.ask(ctx, putMessage(key, c.id)); err != nil {
			return link{}, err
		}
	}
	var at ma.Multiaddr
	for at == nil { // until the relay has identified a
		resp, err := a.ask(ctx, getMessage(key))
		if err != nil {
			return link{}, err
		}
		for _, p := range resp.CloserPeers {
			if addrs := p.Addresses(); peer.ID(p.Id) == b.id && addrs[len(addrs)-1].Equal(a.sees) {
				at = a.sees
			}
		}
	}
	addr, err := manet.ToNetAddr(at.Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return link{}, err
	}
	return dialTo(ctx, a, b, addr)
}

// BenchmarkBridge prints the table. Its parts can be run one by one, as
// -bench Bridge/throughput.
func BenchmarkBridge(b *testing.B) {
	t := newTable()
	b.Run("throughput", func(b *testing.B) { benchBridgeThroughput(b, t) })
	fmt.Fprintf(os.Stderr, "\n%s", t)
}

func benchBridgeThroughput(b *testing.B, t *table) {
	const total = 192 << 20
	t.row("links", "way", "MiB/s", "relay CPU s/GiB", "clients' CPU s/GiB", "relay CPU / a circuit's", "MiB/s / a circuit's")
	for _, n := range []int{1, 8, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := benchRelay(b, "product", "--circuit-bytes=1TiB")
			defer p.kill()
			clients, circuits := benchCircuits(b, p, n)
			ways := []struct {
				name  string
				links []link
				runs  []carried
			}{{name: "circuit", links: circuits}, {name: "bridge"}, {name: "direct"}}
			for _, pair := range clients {
				over, err := overBridge(testContext(b), pair[0], pair[1])
				if err != nil {
					b.Fatal(err)
				}
				past, err := direct(testContext(b), pair[0], pair[1])
				if err != nil {
					b.Fatal(err)
				}
				ways[1].links, ways[2].links = append(ways[1].links, over), append(ways[2].links, past)
			}
			for _, w := range ways { // once unmeasured, as in benchCarry
				p.carry(b, w.links, total/8)
			}
			profiled := make(chan struct{})
			go func() {
				defer close(profiled)
				p.profile(b, "profile?seconds=10", fmt.Sprintf("cpu-bridge-%d.pb.gz", n))
			}()
			for range 3 {
				for i := range ways {
					ways[i].runs = append(ways[i].runs, p.carry(b, ways[i].links, total))
				}
			}
			<-profiled
			circuit := median(ways[0].runs)
			for _, w := range ways {
				m := median(w.runs)
				t.row(n, w.name, m.mibps, m.relay, m.clients, m.relay/circuit.relay, m.mibps/circuit.mibps)
			}
		})
	}
}
