//go:build interop

package main

// How long it takes until a second device has met the first, by the clients' own
// stack, among any number of strangers.

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// mates are the kinds of pairs, each with the place of the first device, which is
// there already, and the second, whose times count.
var mates = []struct {
	name          string
	first, second []string // places, taken in turn
	args          []string // to both
}{
	{"both public", []string{"public"}, []string{"public"}, nil},
	{"one public", []string{"public", "restricted"}, []string{"restricted", "public"}, nil},
	{"both behind port-restricted NATs", []string{"restricted"}, []string{"restricted"}, nil},
	{"both behind symmetric NATs", []string{"symmetric"}, []string{"symmetric"}, []string{"circuit=1"}},
}

const (
	// matePairs is how many of each kind meet at once.
	matePairs = 5

	// mateTick is how often a client publishes and looks: 30 s and a quarter.
	mateTick = 37500 * time.Millisecond

	// mateEvery is how far apart they start: a device takes a second of one core
	// to start and join, and all kinds share this machine with their strangers.
	mateEvery = 250 * time.Millisecond

	// mateWait is how long a pair has: two ticks and what a query may take.
	mateWait = 2*mateTick + 15*time.Second
)

// times are how long something took, of those for whom it happened.
type times struct {
	took []time.Duration
	of   int
}

func (ts *times) add(e rustEvent) {
	ts.of++
	if e != nil {
		ts.took = append(ts.took, e["after"].(time.Duration))
		slices.Sort(ts.took)
	}
}

func (ts times) quantile(q float64) time.Duration {
	if len(ts.took) == 0 {
		return 0
	}
	return ts.took[min(int(q*float64(len(ts.took))), len(ts.took)-1)]
}

func (ts times) String() string {
	return fmt.Sprintf("%.1f / %.1f s, %.0f %%", ts.quantile(0.5).Seconds(), ts.quantile(0.99).Seconds(), 100*float64(len(ts.took))/float64(ts.of))
}

// BenchmarkMeet prints, for each number of strangers and share of them whose
// addresses swallow what is sent there: the time from the start of a device until
// its record is stored at the relay, its mate's is found, and the mate is
// connected, as p50 / p99 and the share for whom it happened. All pairs of all
// kinds meet at the same time, by one relay; but where there are few strangers
// each four by a relay of their own, so that it does know few. It takes an hour:
//
//	go test -tags interop -run '^$' -bench Meet -benchtime 1x -timeout 0 .
func BenchmarkMeet(b *testing.B) {
	fmt.Print("\n| answers, swallowing, strangers | stored | found")
	for _, m := range mates {
		fmt.Print(" | connected: ", m.name)
	}
	fmt.Println(" |\n|---" + strings.Repeat("|---", 2+len(mates)) + "|")
	for _, answers := range []string{"amended", "plain"} {
		b.Run(answers, func(b *testing.B) {
			for _, swallow := range []int{0, 50, 90} {
				b.Run(fmt.Sprint(swallow), func(b *testing.B) {
					for _, strangers := range []int{10, 100, 1000, 10_000} {
						b.Run(fmt.Sprint(strangers), func(b *testing.B) {
							stored, found, connected := meetAmong(b, answers, crowdSize{Clients: strangers, Open: 1 - float64(swallow)/100})
							fmt.Printf("| %s, %d %%, %d | %v | %v", answers, swallow, strangers, stored, found)
							for _, c := range connected {
								fmt.Printf(" | %v", c)
							}
							fmt.Println(" |")
						})
					}
				})
			}
		})
	}
}

// meetAmong lets all pairs meet.
func meetAmong(b *testing.B, answers string, strangers crowdSize) (stored, found times, connected []times) {
	l := newLab(b)
	var homes [2]map[string]string // each side's namespace for each place
	var outside []string           // the namespaces with public addresses
	for side := range homes {
		public := l.public(fmt.Sprint("public", side), fmt.Sprintf("11.1.0.%d/8", side+1))
		homes[side] = map[string]string{"public": public}
		outside = append(outside, public)
		for i, kind := range []natKind{endpointIndependent, endpointDependent} {
			place := []string{"restricted", "symmetric"}[i]
			router := l.router(fmt.Sprint(place, side), fmt.Sprintf("11.2.%d.%d/8", i, side+1), kind)
			homes[side][place] = l.home(fmt.Sprint("home", place, side), router, 10)
			outside = append(outside, router)
		}
	}
	relays := make([]peer.AddrInfo, 1)
	if strangers.Clients+2*len(mates) <= maxNamed {
		relays = make([]peer.AddrInfo, matePairs)
	}
	for i := range relays {
		ns := l.public("relay", fmt.Sprintf("11.0.0.%d/8", i+1))
		relays[i] = l.relayWith(ns, answers, fmt.Sprint("11.0.0.", i+1))
		network := fmt.Sprint("11.", 100+i)
		crowd := l.crowd(relays[i], network)
		for _, ns := range append(outside, ns) {
			l.in(ns, "ip route add "+network+".0.0/16 via "+network+".255.254")
		}
		crowd.grow(strangers)
	}

	var clients [2][]*rustClient
	every := time.NewTicker(mateEvery)
	defer every.Stop()
	for side := range clients {
		for kind, m := range mates {
			for pair := range matePairs {
				<-every.C
				places := [][]string{m.first, m.second}[side]
				by := []string{"ip", "netns", "exec", homes[side][places[pair%len(places)]]}
				args := append([]string{"listen=/ip4/0.0.0.0/udp/0/quic-v1"}, m.args...)
				clients[side] = append(clients[side], startRustBy(b, by, relays[pair%len(relays)], fmt.Sprint(kind, " ", pair), args...))
			}
		}
		if side == 0 { // they have been here for a while when the others come
			waitAll(clients[0], time.Minute, "stored")
		}
	}
	second := clients[1]
	connects := waitAll(second, mateWait, "connected", clients[0]...)
	stores, finds := waitAll(second, 0, "stored"), waitAll(second, 0, "found", clients[0]...)
	connected = make([]times, len(mates))
	for i := range second {
		stored.add(stores[i])
		found.add(finds[i])
		connected[i/matePairs].add(connects[i])
	}
	return stored, found, connected
}

// labCrowd is a running crowd.
type labCrowd struct {
	t   testing.TB
	enc *json.Encoder
	dec *json.Decoder
}

// crowd starts a crowd of nobody yet, whose addresses are those of network. To
// reach many of them, go by the last, 255.254: the kernel keeps 1 024 neighbours.
func (l *lab) crowd(relay peer.AddrInfo, network string) *labCrowd {
	l.t.Helper()
	ns := l.public("crowd", network+".255.254/8")
	l.in(ns, "ip route add local "+network+".0.0/16 dev lo")
	l.nft(ns, fmt.Sprintf("table ip sink {\nchain arriving { type filter hook input priority filter; udp dport %d drop; }\n}", crowdSink))
	enc, dec := l.talk(ns, fmt.Sprintf("%s=%s/p2p/%s %s", labCrowdEnv, relay.Addrs[0], relay.ID, network))
	return &labCrowd{l.t, enc, dec}
}

// grow lets clients join until they are as many as size says.
func (c *labCrowd) grow(size crowdSize) {
	c.t.Helper()
	err := c.enc.Encode(size)
	if err == nil {
		err = c.dec.Decode(&size)
	}
	if err == nil && size.Err != "" {
		err = errors.New(size.Err)
	}
	if err != nil {
		c.t.Fatalf("the crowd: %v", err)
	}
}

// relayWith runs a relay in ns, at addr, whose answers are "plain" or "amended".
func (l *lab) relayWith(ns, answers, addr string) peer.AddrInfo {
	l.t.Helper()
	return l.relayOf(l.self(ns, labRelayEnv+"="+answers), []string{"/ip4/" + addr + "/udp/4001/quic-v1"})
}

// waitAll waits for each client's event, with its mate where there are mates, at
// most for the time given. An event that did not come is nil.
func waitAll(clients []*rustClient, most time.Duration, event string, mates ...*rustClient) []rustEvent {
	got := make([]rustEvent, len(clients))
	deadline := time.Now().Add(most)
	var waiting sync.WaitGroup
	for i, c := range clients {
		waiting.Go(func() {
			var fields []string
			if mates != nil {
				fields = []string{"peer", mates[i].id}
			}
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for {
				for _, e := range c.seen(0) {
					if e.is(event, fields...) {
						got[i] = e
						return
					}
				}
				if time.Now().After(deadline) {
					return
				}
				<-tick.C
			}
		})
	}
	waiting.Wait()
	return got
}
