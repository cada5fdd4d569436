package main

// The DNS names in the operator's addresses, and the IP addresses that they resolve
// to. The deployed clients cannot dial a name, so we give them IP addresses first.

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

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
	madns "github.com/multiformats/go-multiaddr-dns"
)

const (
	// nameRefresh sets how often a name is looked up. The system's resolver does not
	// say how long an answer is valid, so this is short. The resolver answers from
	// its cache.
	nameRefresh = time.Minute

	// nameRetry sets how soon a failed lookup is tried again, because at boot the
	// network may be up within seconds. The wait doubles each time, up to nameRefresh.
	nameRetry = time.Second

	// nameTimeout limits one lookup. Resolvers try a server for 5 s, and then the
	// next one.
	nameTimeout = 15 * time.Second

	// nameDialWait limits how long a dial waits until a name that has led nowhere yet is
	// looked up. The swarm looks up all names of a relay before it dials any address.
	nameDialWait = 2 * time.Second

	// nameFirstWait limits how long the start waits for the first answers, so that
	// they appear in the banner. Without DNS the relay starts anyway.
	nameFirstWait = 3 * time.Second
)

// names follows the IP addresses of DNS names. Make it with newNames, call add, then
// follow; end it with close.
type names struct {
	log      *slog.Logger
	resolver *madns.Resolver

	cancel   context.CancelFunc
	running  sync.WaitGroup
	answered sync.WaitGroup // waits for the first answer or failure of each name

	mu     sync.Mutex
	leadTo map[string][]ma.Multiaddr // the last good answer for each address with a name, sorted
}

// newNames returns names that asks resolver.
func newNames(resolver madns.BasicResolver, log *slog.Logger) *names {
	r, err := madns.NewResolver(madns.WithDefaultResolver(resolver))
	if err != nil {
		panic(err) // only an option can fail, and this one does not
	}
	return &names{log: log, resolver: r, leadTo: make(map[string][]ma.Multiaddr)}
}

// add registers the DNS names among addrs. Call it before follow.
func (n *names) add(addrs ...ma.Multiaddr) {
	for _, a := range addrs {
		if isDNS(a) {
			n.leadTo[a.String()] = nil
		}
	}
}

// follow looks up all names until close. When an answer differs from the last, it
// calls changed, from any goroutine. It returns when each name has been tried once,
// or after nameFirstWait.
func (n *names) follow(changed func()) {
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	texts := slices.Collect(maps.Keys(n.leadTo)) // a copy, because the map changes with the first answer
	n.answered.Add(len(texts))
	for _, text := range texts {
		n.running.Go(func() { n.followOne(ctx, ma.StringCast(text), changed) }) // close waits for it
	}
	all := make(chan struct{})
	go func() { // ends with the last lookup, within nameTimeout
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

func (n *names) followOne(ctx context.Context, addr ma.Multiaddr, changed func()) {
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
				changed()
			}
			retry, failing = nameRetry, false
		} else {
			if !failing { // warn once per outage
				failing = true
				last := n.withIPs([]ma.Multiaddr{addr})
				n.log.Warn("name not resolved, trying again; meanwhile clients get the last known addresses", "name", name, "err", err, "addrs", last)
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

// lookUp returns the IP addresses that addr resolves to now, in a fixed order, or an
// error that says why there are none.
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
		return nil, fmt.Errorf("it resolves to %s, which no client can reach; see /etc/hosts", strings.Join(strs(found), " "))
	}
	slices.SortFunc(usable, ma.Multiaddr.Compare)
	return slices.CompactFunc(usable, ma.Multiaddr.Equal), nil
}

// ResolveDNSComponent makes n the swarm's resolver, with ResolveDNSAddr. The swarm asks for
// each name among the addresses of another relay, one after the other, before it dials any
// of them. If it had to wait for a DNS server that hangs, it would never dial, although n
// knows where the names led.
func (n *names) ResolveDNSComponent(ctx context.Context, addr ma.Multiaddr, most int) ([]ma.Multiaddr, error) {
	if ips := n.known(addr); len(ips) > 0 {
		return ips[:min(len(ips), most)], nil
	}
	ctx, cancel := context.WithTimeout(ctx, nameDialWait)
	defer cancel()
	return swarm.ResolverFromMaDNS{Resolver: n.resolver}.ResolveDNSComponent(ctx, addr, most)
}

// ResolveDNSAddr does for /dnsaddr what ResolveDNSComponent does for other names.
func (n *names) ResolveDNSAddr(ctx context.Context, id peer.ID, addr ma.Multiaddr, deep, most int) ([]ma.Multiaddr, error) {
	if ips := n.known(addr); len(ips) > 0 {
		return ips[:min(len(ips), most)], nil
	}
	ctx, cancel := context.WithTimeout(ctx, nameDialWait)
	defer cancel()
	return swarm.ResolverFromMaDNS{Resolver: n.resolver}.ResolveDNSAddr(ctx, id, addr, deep, most)
}

// known returns what addr, which begins with a name, led to when it was last looked up.
func (n *names) known(addr ma.Multiaddr) []ma.Multiaddr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.leadTo[addr.String()]
}

// isReachable reports whether another machine can send to ip.
func isReachable(ip netip.Addr) bool {
	return ip.IsValid() && !ip.IsUnspecified() && !ip.IsLoopback() && !ip.IsMulticast() && !ip.IsLinkLocalUnicast()
}

// withIPs returns the IP addresses among addrs and those that the names among them
// resolve to, in their order, each once, at most maxOfferedAddrs. The names follow.
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
