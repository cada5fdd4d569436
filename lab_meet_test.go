//go:build interop

package main

// How long it takes until a second device has met the first, by the released
// clients, from wherever they are and among any number of strangers.

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

const (
	// meetPairs is how many pairs meet at once.
	meetPairs = 20

	// meetRounds is how often they do, with new keys and codes: 100 times in all, so
	// that the 99th percentile is one of them.
	meetRounds = 5
)

// meetPlaces are where the two devices of the nth pair are: each kind of place first
// and second in turn, with another one each time.
func meetPlaces(n int) (first, second place) {
	return places[n%len(places)], places[(n+n/len(places))%len(places)]
}

// times are how long something took, of those for whom it happened.
type times struct {
	took []time.Duration
	of   int
}

// add adds one time, or 0 for never.
func (ts *times) add(d time.Duration) {
	ts.of++
	if d > 0 {
		ts.took = append(ts.took, d)
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
	return fmt.Sprintf("%.2f / %.2f s, %.0f %%", ts.quantile(0.5).Seconds(), ts.quantile(0.99).Seconds(), 100*float64(len(ts.took))/float64(ts.of))
}

// BenchmarkMeet prints, for each round trip to the relay and number of strangers, how
// long after its start a second device has stored its record, found the first one's,
// is connected and has exchanged a message with it: p50 / p99, and the share for whom
// it happened. It takes about ten minutes if everybody meets:
//
//	go test -tags interop -run '^$' -bench Meet -benchtime 1x -timeout 0 .
func BenchmarkMeet(b *testing.B) {
	fmt.Print("\n| to the relay | strangers | stored | found | connected | message |\n|---" + strings.Repeat("|---", 5) + "|\n")
	for _, rtt := range []time.Duration{0, 80 * time.Millisecond, 200 * time.Millisecond} {
		b.Run(fmt.Sprint(rtt), func(b *testing.B) {
			m := newMeeting(b, rtt)
			for _, strangers := range []int{10, 1000, 10_000} {
				b.Run(fmt.Sprint(strangers), func(b *testing.B) {
					m.crowd.grow(crowdSize{Clients: strangers, Open: 0.5})
					stored, found, connected, message := m.run(b)
					fmt.Printf("| %v | %d | %v | %v | %v | %v |\n", rtt, strangers, stored, found, connected, message)
				})
			}
		})
	}
}

// meeting is a site with places for all pairs, and strangers.
type meeting struct {
	*site
	crowd  *labCrowd
	pairs  [meetPairs][2]*device
	rounds int // so far
}

func newMeeting(b *testing.B, rtt time.Duration) *meeting {
	b.Helper()
	l := newLab(b)
	host := l.public
	if rtt > 0 {
		host = func(name string, addrs ...string) string { return l.far(name, rtt, 0, addrs...) }
	}
	ns := host("relay", "11.0.0.1/8", "2a00:1::1/64")
	m := &meeting{site: l.site(ns)}
	const network = "11.100"
	m.crowd = l.crowd(m.reach(atPublic), network)
	outside := []string{ns} // who may be sent to a stranger
	for n := range m.pairs {
		first, second := meetPlaces(n)
		m.pairs[n] = [2]*device{m.place(first, 2*n), m.place(second, 2*n+1)}
		for _, d := range m.pairs[n] {
			switch d.at {
			case atPublic:
				outside = append(outside, d.ns)
			case atRestricted, atSymmetric:
				outside = append(outside, d.router)
			}
		}
	}
	for _, ns := range outside {
		l.in(ns, "ip route add "+network+".0.0/16 via "+network+".255.254")
	}
	return m
}

// run lets all pairs meet, again and again.
func (m *meeting) run(b *testing.B) (stored, found, connected, message times) {
	s := m.sub(b)
	for range meetRounds {
		m.rounds++
		code := func(n int) string { return fmt.Sprintf("round %d, pair %d", m.rounds, n) }
		for n, pair := range m.pairs {
			s.join(pair[0], code(n))
		}
		for _, pair := range m.pairs {
			s.settle(pair[0])
		}
		for n, pair := range m.pairs {
			s.join(pair[1], code(n))
		}
		deadline := time.Now().Add(meetWithin)
		for _, pair := range m.pairs {
			first, second := pair[0], pair[1]
			message.add(since(second.first(0, deadline, messageWith(first.rustClient))))
			for _, step := range []struct {
				*times
				ok func(e rustEvent) bool
			}{
				{&stored, func(e rustEvent) bool { return e.is("stored") }},
				{&found, func(e rustEvent) bool { return e.is("found", "peer", first.id) }},
				{&connected, func(e rustEvent) bool { return e.is("connected", "peer", first.id) }},
			} {
				step.add(since(second.first(0, deadline, step.ok)))
			}
		}
		for _, pair := range m.pairs {
			pair[0].kill()
			pair[1].kill()
		}
	}
	return stored, found, connected, message
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
