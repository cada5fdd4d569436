package main

// Budgets: how much of the relay's CPU the clients of one network can take.
//
// A request costs 0.14 to 0.16 ms of CPU while the relay is kept busy, and 0.2 to 0.4 ms
// at the pace of a few thousand clients (docs/performance.md). A stream that is opened
// and reset costs 13 µs, and a packet of hundreds of frames up to a millisecond. What an
// honest client costs goes unnoticed, but a few hostile ones can keep all cores busy. So
// each network may make a number of requests per second, and send a number of frames
// beyond the usual ones. Requests beyond the budget wait. A client that sends frames
// beyond it is disconnected. (HTTP requests have budgets of their own, in httpapi.go.)

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// requestsPerClient sets how many requests a network can make at once, for each
	// client that it may have. An app that starts makes about ten.
	requestsPerClient = 16

	// requestsPerSecond sets how many requests it can then make per second, for each
	// client that it may have. The clients make three in 30 s.
	requestsPerSecond = 0.5

	// requestPace caps how many requests a network can make in any one second, for
	// each client that it may have. When all clients of an office come back at once,
	// they are served within two seconds, and nobody else notices.
	requestPace = 8

	// framesPerSecond limits how many frames beyond usualFrames the packets of one
	// network may have in a second. They cost 12 ms of CPU at worst. Honest clients
	// hardly ever send any.
	framesPerSecond = 5000

	// budgetAge sets how long we keep the budget of a network that has no connection
	// left. After that time it is full again, unless requests had to wait: see forget.
	budgetAge = requestsPerClient / requestsPerSecond * time.Second
)

// budgets holds the budgets of all networks.
type budgets struct {
	perNetwork int // connections
	free       func(netip.Addr) bool

	mu sync.Mutex
	by map[netip.Prefix]*budget
}

func newBudgets(lim limits) *budgets {
	return &budgets{perNetwork: lim.perNetwork, free: lim.free, by: make(map[netip.Prefix]*budget)}
}

// budget limits what one network may spend. Release it once for each time that of
// returned it. A nil *budget has no limit.
type budget struct {
	all      *budgets
	network  netip.Prefix
	requests *rate.Limiter
	pace     *rate.Limiter // limits bursts of requests
	frames   *rate.Limiter

	users int // connections; guarded by all.mu
}

// of returns the budget of the network that addr is in, or nil if it has none.
func (b *budgets) of(addr netip.Addr) *budget {
	if b.free(addr) {
		return nil
	}
	network := networkOf(addr)
	b.mu.Lock()
	defer b.mu.Unlock()
	one := b.by[network]
	if one == nil {
		n := float64(b.perNetwork)
		one = &budget{
			all:      b,
			network:  network,
			requests: rate.NewLimiter(rate.Limit(n*requestsPerSecond), int(n*requestsPerClient)),
			pace:     rate.NewLimiter(rate.Limit(n*requestPace), b.perNetwork),
			frames:   rate.NewLimiter(framesPerSecond, framesPerSecond),
		}
		b.by[network] = one
	}
	one.users++
	return one
}

func (b *budget) release() {
	if b == nil {
		return
	}
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	if b.users--; b.users > 0 {
		return
	}
	time.AfterFunc(budgetAge, b.forget)
}

// forget forgets a budget that nobody uses, once it is full. Otherwise a client could leave
// and come back to a full one.
func (b *budget) forget() {
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	if b.users > 0 || b.all.by[b.network] != b {
		return
	}
	if missing := float64(b.requests.Burst()) - b.requests.Tokens(); missing > 0 { // pace and frames are full sooner
		time.AfterFunc(time.Duration(missing/float64(b.requests.Limit())*float64(time.Second)), b.forget)
		return
	}
	delete(b.all.by, b.network)
}

// spend takes n from one of the budget's limiters, and returns how long to wait.
func (b *budget) spend(from *rate.Limiter, n int) time.Duration {
	return from.ReserveN(time.Now(), min(n, from.Burst())).Delay()
}
