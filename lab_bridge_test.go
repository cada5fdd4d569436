//go:build linux

package main

// How fast the bridge is and what it costs, compared with a circuit and a direct
// link between the same clients, in turns.
//
//	go test -run '^$' -bench Bridge -benchtime 1x -timeout 1h .
//
// This prints one table. It needs Linux. As with Capacity, nothing is asserted, and
// ratios compare figures of one run.

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// overBridge connects a to b over the bridge. Both say at which address they see the
// relay.
func overBridge(ctx context.Context, a, b *lightClient) (link, error) {
	key := newGroupKey()
	for _, c := range []*lightClient{a, b} {
		if _, err := c.ask(ctx, putMessage(key, c.id)); err != nil {
			return link{}, err
		}
	}
	var at ma.Multiaddr
	for at == nil { // repeat until the relay has identified a
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

// BenchmarkBridge prints the table. Run one part by its name, as in -bench
// Bridge/throughput.
func BenchmarkBridge(b *testing.B) {
	t := newTable()
	b.Run("throughput", func(b *testing.B) { benchBridgeThroughput(b, t) })
	b.Run("latency", func(b *testing.B) { benchBridgeLatency(b, t) })
	b.Run("floor", func(b *testing.B) { benchBridgeFloor(b, t) })
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

// benchBridgeLatency measures what a bridge adds to a round trip, and what a circuit
// adds, first alone and then while eight other bridges carry all they can.
func benchBridgeLatency(b *testing.B, t *table) {
	p := benchRelay(b, "product", "--circuit-bytes=1TiB")
	defer p.kill()
	clients, circuits := benchCircuits(b, p, 9)
	var bridges []link
	for _, pair := range clients {
		over, err := overBridge(testContext(b), pair[0], pair[1])
		if err != nil {
			b.Fatal(err)
		}
		bridges = append(bridges, over)
	}
	past, err := direct(testContext(b), clients[0][0], clients[0][1])
	if err != nil {
		b.Fatal(err)
	}
	ways := []struct {
		name string
		link
	}{{"direct", past}, {"bridge", bridges[0]}, {"circuit", circuits[0]}}
	for _, w := range ways {
		go echo(w.to) // ends with the relay
	}
	t.row("")
	t.row("round trip", "way", "p50", "p99", "added p50", "added p99", "added p99, under load / idle")
	idle := map[string]time.Duration{}
	for _, load := range []string{"idle", "under load"} {
		ctx, stop := context.WithCancel(context.Background())
		var loading sync.WaitGroup
		if load == "under load" {
			loading.Go(func() {
				for ctx.Err() == nil {
					transfer(bridges[1:], 4<<20)
				}
			})
		}
		var p50, p99 time.Duration
		for i, w := range ways {
			took, err := w.roundTrips(2000)
			if err != nil {
				b.Fatal(err)
			}
			m, most := percentile(took, 0.5), percentile(took, 0.99)
			if i == 0 {
				p50, p99 = m, most
			}
			added, ratio := most-p99, any("")
			if load == "idle" {
				idle[w.name] = added
			} else if i > 0 {
				ratio = float64(added) / float64(idle[w.name])
			}
			t.row(load, w.name, m, most, m-p50, added, ratio)
		}
		stop()
		loading.Wait()
	}
}

// benchBridgeFloor compares the bridge with what the kernel needs to forward the
// same packets: nftables NAT in a namespace. The kernel forwards in the sender's
// time, so for both the table shows what all processes use together, minus what a
// direct link uses. It needs what the NAT lab needs.
func benchBridgeFloor(b *testing.B, t *table) {
	const total = 96 << 20
	t.row("")
	t.row("links", "way, in namespaces", "MiB/s", "all CPU s/GiB", "beyond direct's", "beyond direct's / the kernel's")
	for _, n := range []int{1, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l := newLab(b)
			relay, nat := l.public("relay", "11.0.0.1/8"), l.public("nat", "11.0.0.9/8")
			left, right := l.public("left", "11.0.0.2/8"), l.public("right", "11.0.0.3/8")
			cmd := command(b, "--port=4001", "--http-port=4002", "--circuit-bytes=1TiB")
			cmd.Args = append([]string{"ip", "netns", "exec", relay}, cmd.Args...)
			cmd.Path, _ = exec.LookPath("ip")
			p := launch(b, cmd)
			defer p.kill()
			p.bootstrap.Addrs = []ma.Multiaddr{ma.StringCast(relayV4)}

			froms, tos := l.sockets(left, "11.0.0.2", n), l.sockets(right, "11.0.0.3", n)
			rules := "table ip forward {\nchain arriving { type nat hook prerouting priority dstnat;\n"
			for i, to := range tos {
				rules += fmt.Sprintf("ip daddr 11.0.0.9 udp dport %d dnat to 11.0.0.3:%d\n", 20000+i, to.LocalAddr().(*net.UDPAddr).Port)
			}
			l.nft(nat, rules+"}\nchain leaving { type nat hook postrouting priority srcnat; masquerade; }\n}")
			l.in(nat, "sysctl -q net.ipv4.ip_forward=1")
			ways := []struct {
				name  string
				links []link
				runs  []carried
			}{{name: "direct"}, {name: "kernel"}, {name: "bridge"}}
			for i := range froms {
				var pair [2]*lightClient
				for j, conn := range []*net.UDPConn{froms[i], tos[i]} {
					who := newLightIdentity(b)
					who.sees = p.bootstrap.Addrs[0]
					client, err := newCrowdFrom(b, []*net.UDPConn{conn}).dial(testContext(b), who, p.bootstrap)
					if err != nil {
						b.Fatal(err)
					}
					pair[j] = client
				}
				for j, connect := range []func() (link, error){
					func() (link, error) { return direct(testContext(b), pair[0], pair[1]) },
					func() (link, error) {
						return dialTo(testContext(b), pair[0], pair[1], &net.UDPAddr{IP: net.IPv4(11, 0, 0, 9), Port: 20000 + i})
					},
					func() (link, error) { return overBridge(testContext(b), pair[0], pair[1]) },
				} {
					over, err := connect()
					if err != nil {
						b.Fatal(ways[j].name, err)
					}
					ways[j].links = append(ways[j].links, over)
				}
			}
			for _, w := range ways {
				p.carry(b, w.links, total/8)
			}
			for range 3 {
				for i := range ways {
					ways[i].runs = append(ways[i].runs, p.carry(b, ways[i].links, total))
				}
			}
			all := func(c carried) float64 { return c.relay + c.clients }
			none := all(median(ways[0].runs))
			kernel := all(median(ways[1].runs)) - none
			for _, w := range ways {
				m := median(w.runs)
				t.row(n, w.name, m.mibps, all(m), all(m)-none, (all(m)-none)/kernel)
			}
		})
	}
}
