package main

// Many relays: whether each device holds connections to few of them, whether all devices
// meet, and what happens when relays go and come.
//
// With go test there are 400 devices. RELAYS=full is for 4 000, which keep two cores busy
// for three minutes; beside other work their requests time out:
//
//	RELAYS=full go test -run ManyRelays -v -timeout 30m .

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// party is a federation and groups of devices, each of which knows one relay.
type party struct {
	planned []*plannedRelay
	alive   []testRelay
	crowd   *crowd
	groups  [][]*walker
}

// join makes groups of two to five until there are that many devices, or one less. They
// know any of the relays that are alive.
func (p *party) join(t testing.TB, devices int) {
	t.Helper()
	for size := 0; devices > 1; size++ {
		key, n := newGroupKey(), min(2+size%4, devices)
		var group []*walker
		for range n {
			group = append(group, p.crowd.walker(t, p.alive[rand.N(len(p.alive))], key))
		}
		p.groups, devices = append(p.groups, group), devices-n
	}
}

// closest returns the relays that are to keep the record with that key, as kad-dht's own
// routing table has it.
func (p *party) closest(key []byte) []peer.ID {
	var ids []peer.ID
	for _, r := range p.alive {
		ids = append(ids, r.info.ID)
	}
	return kb.SortClosestPeers(ids, kb.ConvertKey(string(key)))[:min(groupRelays, len(ids))]
}

// stranded reports whether w knows no relay that is alive.
func (p *party) stranded(w *walker) bool {
	return !slices.ContainsFunc(append([]peer.AddrInfo{w.home}, w.met...), func(info peer.AddrInfo) bool {
		return slices.ContainsFunc(p.alive, func(r testRelay) bool { return r.info.ID == info.ID })
	})
}

// tick lets each device publish and look once, those of one group in turn. It returns how
// many pairs do not meet: neither finds the other, although one looked after the other
// had published. It prints how many pairs lost each other for a moment: one of them did
// not find the other. Devices that are stranded are left out.
func (p *party) tick(t testing.TB, when string) (apart int) {
	t.Helper()
	var pairs, unfound, lost, stranded atomic.Int64
	began := time.Now()
	inParallel(t, len(p.groups), 8, func(ctx context.Context, i int) error {
		group := slices.DeleteFunc(slices.Clone(p.groups[i]), p.stranded)
		stranded.Add(int64(len(p.groups[i]) - len(group)))
		for j, w := range group {
			if err := w.publish(ctx, p.alive); err != nil {
				return err
			}
			sights, err := w.look(ctx, p.alive)
			if err != nil {
				return err
			}
			for k, mate := range group {
				switch found := finds(sights, mate); {
				case k > j:
					pairs.Add(1)
					if !found {
						lost.Add(1)
					}
				case k < j && !found:
					unfound.Add(1)
				}
			}
		}
		return nil
	})
	t.Logf("%-34s %d pairs: %d lost each other for a moment (%.2f %%), %d do not meet; %d devices know no relay that is left (%v)",
		when+":", pairs.Load(), lost.Load(), 100*float64(lost.Load())/float64(pairs.Load()), unfound.Load(), stranded.Load(), time.Since(began).Round(time.Second))
	return int(unfound.Load())
}

// mustMeet is a tick after which the test fails if a pair does not meet.
func (p *party) mustMeet(t testing.TB, when string) {
	t.Helper()
	if n := p.tick(t, when); n > 0 {
		t.Errorf("%s: %d pairs do not meet", when, n)
	}
}

// bridge lets the last of each group connect over the bridge to the device that it is
// offered, at one of the relays that offer it.
func (p *party) bridge(t testing.TB) {
	t.Helper()
	var apart atomic.Int64
	inParallel(t, len(p.groups), 8, func(ctx context.Context, i int) error {
		last := p.groups[i][len(p.groups[i])-1]
		for ctx.Err() == nil {
			sights, err := last.look(ctx, p.alive)
			if err != nil {
				return err
			}
			offers := slices.DeleteFunc(sights, func(s sight) bool { return !s.addrs[len(s.addrs)-1].Equal(s.via.sees) })
			if len(offers) == 0 {
				continue
			}
			offer := offers[i%len(offers)]
			mate := p.groups[i][slices.IndexFunc(p.groups[i], func(w *walker) bool { return w.id == offer.id })]
			if mate.home.ID != last.home.ID {
				apart.Add(1)
			}
			at, err := manet.ToNetAddr(offer.via.sees.Decapsulate(ma.StringCast("/quic-v1")))
			if err != nil {
				return err
			}
			over, err := dialTo(ctx, offer.via, &lightClient{lightIdentity: mate.lightIdentity, transport: mate.transport}, at)
			if err != nil {
				return err
			}
			over.from.CancelWrite(0)
			return nil
		}
		return fmt.Errorf("nobody is offered: %w", ctx.Err())
	})
	t.Logf("%d groups bridged, %d of them between devices that know different relays", len(p.groups), apart.Load())
}

// gossip lets the devices of each group tell each other of the relays that they have met,
// as the deployed clients do: they answer each other's requests.
func (p *party) gossip() {
	for _, group := range p.groups {
		var all []peer.AddrInfo
		for _, w := range group {
			all = append(all, w.met...)
		}
		for _, w := range group {
			w.met = all
		}
	}
}

// clients returns the devices that r holds.
func (p *party) clients(r testRelay) (ids []peer.ID) {
	for _, id := range r.host.Network().Peers() {
		if r.federation.get(id) == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// held prints how many devices each relay holds.
func (p *party) held(t testing.TB, when string) {
	t.Helper()
	devices, sum := 0, 0
	for _, group := range p.groups {
		devices += len(group)
	}
	var each []int
	for _, r := range p.alive {
		each = append(each, len(p.clients(r)))
		sum += each[len(each)-1]
	}
	t.Logf("%s: of %d devices each holds %v, on average %.1f %%; when answers named all relays, each held 100 %%", when, devices, each, 100*float64(sum)/float64(devices*len(p.alive)))
}

// Who runs several relays for many devices adds machines, and each holds fewer devices.
// And they meet whatever becomes of one or two machines.
func TestManyRelaysShareTheDevices(t *testing.T) {
	devices := 400
	if os.Getenv("RELAYS") == "full" {
		devices = 4000
	}
	const relays = 8
	p := &party{planned: planRelays(t, relays+1), crowd: newCrowdOn(t, devices+devices/10)}
	// All name the first alone, and its operator names all, the last before it is there.
	for _, other := range p.planned[1:] {
		other.named, p.planned[0].named = p.planned[:1], append(p.planned[0].named, other)
	}
	for _, planned := range p.planned[:relays] {
		p.alive = append(p.alive, planned.start(t))
	}
	waitMesh(t, p.alive)
	p.join(t, devices)
	inParallel(t, len(p.groups), 8, func(ctx context.Context, i int) error {
		for _, w := range p.groups[i] {
			if err := w.publish(ctx, p.alive); err != nil {
				return err
			}
		}
		return nil
	})
	p.bridge(t)
	p.mustMeet(t, "all are there")
	p.held(t, "eight relays")
	for _, group := range p.groups {
		for _, w := range group {
			want := p.closest(w.key)
			if !slices.Contains(want, w.home.ID) {
				want = append(want, w.home.ID)
			}
			if len(w.met) != len(want) || slices.ContainsFunc(want, func(id peer.ID) bool { return w.conns[id] == nil }) {
				t.Fatalf("a device is connected to %v, want %v", w.met, want)
			}
		}
	}
	p.gossip()
	p.mustMeet(t, "all have asked each other")
	p.held(t, "eight relays, each also told of by mates")

	for _, gone := range [][]int{{1, 2}, {0}} { // two first, since then each device knows three relays at most
		before := slices.Clone(p.alive)
		for _, i := range gone {
			if err := before[i].close(); err != nil {
				t.Fatal(err)
			}
		}
		p.alive = slices.Delete(p.alive, gone[0], gone[0]+len(gone))
		waitMesh(t, p.alive)
		p.mustMeet(t, fmt.Sprintf("%d of the relays gone", len(gone)))
		p.mustMeet(t, "... a tick later")
		p.alive = before
		for _, i := range gone {
			p.alive[i] = p.planned[i].start(t)
		}
		waitMesh(t, p.alive)
		p.mustMeet(t, "... all are back")
	}

	heal := p.cut(relays / 2)
	p.mustMeet(t, "four relays cut off from four")
	p.join(t, devices/10)
	p.tick(t, "... and new devices come")
	heal()
	waitMesh(t, p.alive)
	p.mustMeet(t, "... all relays joined again")

	p.alive = append(p.alive, p.planned[relays].start(t))
	waitMesh(t, p.alive)
	p.mustMeet(t, "a relay more")
	added, moved := p.alive[relays], 0
	clients := p.clients(added)
	for _, group := range p.groups {
		if slices.Contains(p.closest(group[0].key), added.info.ID) {
			moved += len(group)
			for _, w := range group {
				if !slices.Contains(clients, w.id) {
					t.Errorf("a device has not moved to the new relay")
				}
			}
		}
	}
	if len(clients) != moved {
		t.Errorf("the new relay holds %d devices, want the %d of the groups that it is closest to", len(clients), moved)
	}
	p.held(t, "nine relays, after all of this")
}

// cut parts the first n relays from the others, until heal is called: it closes each
// connection between them at once.
func (p *party) cut(n int) (heal func()) {
	first := make(map[peer.ID]bool)
	for _, r := range p.alive[:n] {
		first[r.info.ID] = true
	}
	var stops []func()
	for i, r := range p.alive {
		across := func(id peer.ID) bool { return r.federation.get(id) != nil && first[id] != (i < n) }
		closing := &network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
			if across(c.RemotePeer()) {
				go c.Close() // not in a callback of its own network
			}
		}}
		r.host.Network().Notify(closing)
		stops = append(stops, func() { r.host.Network().StopNotify(closing) })
		for _, id := range r.host.Network().Peers() {
			if across(id) {
				r.host.Network().ClosePeer(id)
			}
		}
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}
