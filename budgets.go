package main

// Budgets: how much of the relay's CPU the clients of one network can take.
//
// A request costs about 60 µs, a stream that is opened and reset 13 µs, and a packet of
// hundreds of frames up to a millisecond. No honest client notices what that comes to,
// and a few hostile ones can keep all cores busy with it. So each network has a number of
// requests, and of such frames, for each second. Requests beyond wait, and who sends such
// frames beyond is closed.

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// requestsPerClient is how many requests a client of a network can make at once, if
	// all do so that may be there: an app that starts makes about ten.
	requestsPerClient = 16

	// requestsPerSecond is how many follow each second, for each client that may be
	// there: the clients make three in 30 s.
	requestsPerSecond = 0.5

	// requestPace is how many of those can come in a second, for each client that may be
	// there: when all of an office come back at once, they are served within two seconds,
	// and nobody else notices.
	requestPace = 8

	// framesPerSecond is how many frames beyond usualFrames the packets of one network
	// may have in a second: they cost 12 ms of CPU at worst. Honest ones hardly ever have
	// any.
	framesPerSecond = 5000

	// budgetAge is how long the budget of a network is kept that nobody is connected
	// from: it has all that it may by then.
	budgetAge = requestsPerClient / requestsPerSecond * time.Second
)

// budgets are those of all networks.
type budgets struct {
	perNetwork int // connections
	free       func(netip.Addr) bool

	mu sync.Mutex
	by map[netip.Prefix]*budget
}

func newBudgets(lim limits) *budgets {
	return &budgets{perNetwork: lim.perNetwork, free: lim.free, by: make(map[netip.Prefix]*budget)}
}

// budget is what one network may spend. Release it once for each time that of returned
// it. nil is without bounds.
type budget struct {
	all      *budgets
	network  netip.Prefix
	requests *rate.Limiter
	pace     *rate.Limiter // of requests, in the short run
	frames   *rate.Limiter

	users int // connections; under all.mu
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
	time.AfterFunc(budgetAge, func() {
		b.all.mu.Lock()
		defer b.all.mu.Unlock()
		if b.users == 0 && b.all.by[b.network] == b {
			delete(b.all.by, b.network)
		}
	})
}

// spend takes n from one of the budget's limiters, and returns how long to wait.
func (b *budget) spend(from *rate.Limiter, n int) time.Duration {
	return from.ReserveN(time.Now(), min(n, from.Burst())).Delay()
}

// addrPortOf returns a UDP address as netip has it, with IPv4 addresses never written as
// IPv6 ones.
func addrPortOf(addr net.Addr) netip.AddrPort {
	udp, ok := addr.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := udp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
