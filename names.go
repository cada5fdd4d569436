package main

// The DNS names in the addresses that the operator gave: what each leads to now. The
// deployed clients cannot dial a name, so they are told IP addresses first.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	madns "github.com/multiformats/go-multiaddr-dns"
)

const (
	// nameRefresh is how often a name is looked up. A resolver of the machine does not
	// say for how long an answer holds, so this is short. It answers from its cache.
	nameRefresh = time.Minute

	// nameRetry is when a lookup that failed is tried again, each time after twice as
	// long, up to nameRefresh: at boot the network may be seconds away.
	nameRetry = time.Second

	// nameTimeout bounds one lookup. Resolvers try for 5 s, and then the next server.
	nameTimeout = 15 * time.Second

	// nameFirstWait is how long the start waits for the first answers, so that the
	// banner holds them. Without DNS the relay starts nevertheless.
	nameFirstWait = 3 * time.Second
)

// names follows what DNS names lead to. Make it with newNames, call add, then follow;
// close ends it.
type names struct {
	log      *slog.Logger
	resolver *madns.Resolver

	// changed is called after each answer that differs from the last. follow sets it.
	changed func()

	cancel   context.CancelFunc
	running  sync.WaitGroup
	answered sync.WaitGroup // with the first answer or failure of each name

	mu     sync.Mutex
	leadTo map[string][]ma.Multiaddr // the last good answer for each address with a name, sorted
}

// newNames returns names that asks resolver.
func newNames(resolver madns.BasicResolver, log *slog.Logger) *names {
	r, err := madns.NewResolver(madns.WithDefaultResolver(resolver))
	if err != nil {
		panic(err) // only an option can fail, and this one does not
	}
	return &names{log: log, resolver: r, changed: func() {}, leadTo: make(map[string][]ma.Multiaddr)}
}

// add has the names among addrs followed. It is called before follow.
func (n *names) add(addrs ...ma.Multiaddr) {
	for _, a := range addrs {
		if isDNS(a) {
			n.leadTo[a.String()] = nil
		}
	}
}

// follow looks up all names until close, and calls changed, from any goroutine, when an
// answer differs from the last. It returns when each name has been tried, or after
// nameFirstWait.
func (n *names) follow(changed func()) {
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	n.changed = changed
	texts := slices.Collect(maps.Keys(n.leadTo)) // the map changes with the first answer
	n.answered.Add(len(texts))
	for _, text := range texts {
		n.running.Go(func() { n.followOne(ctx, ma.StringCast(text)) }) // close waits for it
	}
	all := make(chan struct{})
	go func() { // until the last lookup has ended, within nameTimeout
		n.answered.Wait()
		close(all)
	}()
	select {
	case <-all:
	case <-time.After(nameFirstWait):
	}
}

// close stops following. It may be called without follow.
func (n *names) close() {
	if n.cancel != nil {
		n.cancel()
		n.running.Wait()
	}
}

func (n *names) followOne(ctx context.Context, addr ma.Multiaddr) {
	name := addr[0].Value()
	tried := sync.OnceFunc(n.answered.Done)
	defer tried()
	retry, failing := nameRetry, false
	for {
		ips, err := n.lookUp(ctx, addr)
		if ctx.Err() != nil {
			return
		}
		wait := nameRefresh
		if err == nil {
			n.mu.Lock()
			last := n.leadTo[addr.String()]
			n.leadTo[addr.String()] = ips
			n.mu.Unlock()
			differs := !slices.EqualFunc(last, ips, ma.Multiaddr.Equal)
			if differs || failing {
				n.log.Info("name resolved", "name", name, "addrs", ips)
			}
			if differs {
				n.changed()
			}
			retry, failing = nameRetry, false
		} else {
			if !failing { // warn once, until it is resolved again
				failing = true
				last := n.withIPs([]ma.Multiaddr{addr})
				n.log.Warn("name not resolved, trying again; meanwhile clients are told what is known", "name", name, "err", err, "addrs", last)
			}
			wait, retry = retry, min(2*retry, nameRefresh)
		}
		tried()
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// lookUp returns the IP addresses that addr leads to now, in a fixed order, or why
// there are none.
func (n *names) lookUp(ctx context.Context, addr ma.Multiaddr) ([]ma.Multiaddr, error) {
	ctx, cancel := context.WithTimeout(ctx, nameTimeout)
	defer cancel()
	found, err := n.resolver.Resolve(ctx, addr)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, errors.New("it has no address")
	}
	// Debian gives a machine's own name the address 127.0.1.1 in /etc/hosts.
	loopbackToo := strings.TrimSuffix(addr[0].Value(), ".") == "localhost"
	usable := slices.DeleteFunc(slices.Clone(found), func(a ma.Multiaddr) bool {
		ip := ipOf(a)
		return !isQUICAddr(a) || !isReachable(ip) && !(loopbackToo && ip.IsLoopback())
	})
	if len(usable) == 0 {
		return nil, fmt.Errorf("it leads to %s, where no client can reach anything; see /etc/hosts", strings.Join(strs(found), " "))
	}
	slices.SortFunc(usable, ma.Multiaddr.Compare)
	return slices.CompactFunc(usable, ma.Multiaddr.Equal), nil
}

// isReachable reports whether another machine can have ip for its destination.
func isReachable(ip netip.Addr) bool {
	return ip.IsValid() && !ip.IsUnspecified() && !ip.IsLoopback() && !ip.IsMulticast() && !ip.IsLinkLocalUnicast()
}

// withIPs returns the IP addresses among addrs and those that the names among them
// lead to, in their order, each once and at most maxOfferedAddrs; and then the names.
func (n *names) withIPs(addrs []ma.Multiaddr) []ma.Multiaddr {
	if len(addrs) == 0 {
		return nil
	}
	var ips, named []ma.Multiaddr
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range addrs {
		found := []ma.Multiaddr{a}
		if isDNS(a) {
			named = append(named, a)
			found = n.leadTo[a.String()]
		}
		for _, ip := range found {
			if len(ips) < maxOfferedAddrs && !slices.ContainsFunc(ips, ip.Equal) {
				ips = append(ips, ip)
			}
		}
	}
	return append(ips, named...)
}
