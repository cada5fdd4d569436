package main

// Where the relay can be reached: the addresses that it gives to clients in identify
// and in reservations, and shows in the banner and at the identity endpoint. These
// are the addresses that the operator announces, or else the machine's own. The names
// among the former, and the latter, can change at any time.

import (
	"log/slog"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// interfacePoll sets how often we read the machine's addresses. go-libp2p reads them
// once a minute, so a relay that started before its network was up gave out loopback
// addresses in reservations for 64 s.
const interfacePoll = time.Second

// reach knows the relay's addresses. Make it with newReach, call follow when the
// host listens, and end it with close.
type reach struct {
	log      *slog.Logger
	announce []ma.Multiaddr // the operator's choice, without /p2p; empty: the machine's own
	names    *names         // follows the DNS names in announce

	interfaces interfaces
	own        atomic.Pointer[[]ma.Multiaddr] // their IP addresses

	host    host.Host
	stop    chan struct{}
	polling sync.WaitGroup

	mu        sync.Mutex
	recompute event.Emitter  // makes the host tell its peers what has changed; nil: tell nobody
	told      []ma.Multiaddr // what peers and the log were last told
}

// newReach reads the machine's addresses.
func newReach(announce []ma.Multiaddr, names *names, log *slog.Logger) (*reach, error) {
	r := &reach{log: log, announce: announce, names: names, stop: make(chan struct{})}
	own, err := r.interfaces.read()
	if err != nil {
		return nil, err
	}
	r.own.Store(&own)
	return r, nil
}

// addrs returns the addresses that we give to clients when the host listens on
// listen: the announced ones, IP addresses first, or else the best of the machine's
// own. The result is never empty while the host listens and an interface is up.
func (r *reach) addrs(listen []ma.Multiaddr) []ma.Multiaddr {
	if len(r.announce) > 0 {
		return r.names.withIPs(r.announce)
	}
	own := *r.own.Load()
	var addrs []ma.Multiaddr
	for _, l := range listen {
		// An error means that no interface has an address of this family.
		resolved, _ := manet.ResolveUnspecifiedAddress(l, own)
		addrs = append(addrs, resolved...)
	}
	return bestAddrs(addrs)
}

// isHidden reports whether clients in other networks can reach none of addrs: they
// were not announced, and none is public.
func (r *reach) isHidden(addrs []ma.Multiaddr) bool {
	return len(r.announce) == 0 && !slices.ContainsFunc(addrs, manet.IsPublicAddr)
}

// follow tells h's peers and the log about each change, until close.
func (r *reach) follow(h host.Host) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.host = h
	var err error
	// go-libp2p has no call that makes a host compute its addresses anew, only events
	// that cause it. The host subscribes to this event for relay clients. Ours is not
	// one, so the event adds nothing by itself (addrs_manager.go in go-libp2p's
	// p2p/host/basic).
	if r.recompute, err = h.EventBus().Emitter(new(event.EvtAutoRelayAddrsUpdated), eventbus.Stateful); err != nil {
		return err
	}
	r.told = r.now()
	r.recompute.Emit(event.EvtAutoRelayAddrsUpdated{}) // names may have resolved since the host began to listen
	r.polling.Go(r.poll)                               // close waits for it
	return nil
}

// close stops following. It may be called without follow, and more than once.
func (r *reach) close() {
	r.mu.Lock()
	recompute := r.recompute
	r.recompute = nil
	r.mu.Unlock()
	if recompute != nil {
		close(r.stop)
		r.polling.Wait()
		recompute.Close()
	}
}

func (r *reach) poll() {
	tick := time.NewTicker(interfacePoll)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-r.stop:
			return
		case <-tick.C:
		}
		own, err := r.interfaces.read()
		if err != nil {
			if !failing { // warn once per outage
				r.log.Warn("cannot read interface addresses, clients get the last known ones", "err", err)
			}
			failing = true
			continue
		}
		failing = false
		last := *r.own.Load()
		if slices.EqualFunc(own, last, ma.Multiaddr.Equal) {
			continue
		}
		r.own.Store(&own)
		if slices.ContainsFunc(own, isIPv6) && !slices.ContainsFunc(last, isIPv6) {
			// This takes back the warning of sockets.listen.
			r.log.Info("an interface has an IPv6 address now, so clients can reach the relay over IPv6")
		}
		r.update()
	}
}

func isIPv6(a ma.Multiaddr) bool { return ipOf(a).Is6() }

// now returns the addresses that we give to clients at this moment.
func (r *reach) now() []ma.Multiaddr { return r.addrs(r.host.Network().ListenAddresses()) }

// update tells peers and the log if the addresses for clients have changed.
func (r *reach) update() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.recompute == nil {
		return
	}
	last, now := r.told, r.now()
	if slices.EqualFunc(now, last, ma.Multiaddr.Equal) {
		return
	}
	r.told = now
	r.recompute.Emit(event.EvtAutoRelayAddrsUpdated{})
	r.log.Info("addresses changed", "addrs", now)
	switch wasHidden, isHidden := r.isHidden(last), r.isHidden(now); {
	case isHidden && !wasHidden:
		r.warnHidden()
	case wasHidden && !isHidden:
		r.log.Info("a public address appeared, so clients in other networks can use the relay now", "addrs", now)
	}
}

// warnIfHidden warns the operator if clients in other networks cannot use the relay.
func (r *reach) warnIfHidden() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.isHidden(r.told) {
		r.warnHidden()
	}
}

func (r *reach) warnHidden() {
	r.log.Warn("no announced address, and none of ours is public, so only clients in this network can use the relay: "+
		"set --announce to the address where others reach it", "addrs", r.told)
}

// interfaces reads the addresses of a machine's interfaces. The zero value is ready
// to use.
type interfaces struct {
	last  []net.Interface
	addrs []net.Addr
	ips   []ma.Multiaddr
}

// read returns the addresses of the interfaces that are up, in a fixed order.
func (i *interfaces) read() ([]ma.Multiaddr, error) {
	now, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	// To learn which addresses belong to an interface we have to ask the kernel once
	// more for each, and a host of containers has hundreds.
	if reflect.DeepEqual(now, i.last) && reflect.DeepEqual(addrs, i.addrs) {
		return i.ips, nil
	}
	var ips []ma.Multiaddr
	for _, each := range now {
		if each.Flags&net.FlagUp == 0 {
			continue
		}
		addrs, err := each.Addrs()
		if err != nil {
			continue // it has gone meanwhile; the next read will notice
		}
		for _, a := range addrs {
			ip, err := manet.FromNetAddr(a)
			if err == nil && !manet.IsIP6LinkLocal(ip) {
				ips = append(ips, ip)
			}
		}
	}
	slices.SortFunc(ips, ma.Multiaddr.Compare)
	i.last, i.addrs, i.ips = now, addrs, slices.CompactFunc(ips, ma.Multiaddr.Equal)
	return i.ips, nil
}
