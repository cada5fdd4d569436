package main

// The other relays that the operator named (--bootstrap), which are the only hosts
// that this one dials. It stays connected to each, and its answers name them, so that
// clients look and publish there as well.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
)

const (
	// dialTimeout bounds one attempt to connect to a relay. The next attempt follows
	// after minRetry, each later one after twice as long, up to maxRetry. It starts
	// over once a connection has lasted for settleTime: some are accepted and closed
	// at once.
	dialTimeout = 15 * time.Second
	settleTime  = 5 * time.Second
	minRetry    = time.Second
	maxRetry    = 5 * time.Minute
)

// federation is the other relays. Make it with newFederation, then call follow, and
// connect when the host listens; close ends it.
type federation struct {
	log     *slog.Logger
	members map[peer.ID][]ma.Multiaddr // as the operator wrote them; not changed
	names   *names                     // those in members among them

	host    host.Host
	cancel  context.CancelFunc
	keeping sync.WaitGroup
	left    map[peer.ID]chan struct{} // gets a value when the relay may have left
}

// newFederation takes addresses that parseBootstrap accepts; several of one relay
// are several ways to it.
func newFederation(addrs []string, names *names, log *slog.Logger) (*federation, error) {
	f := &federation{log: log, members: make(map[peer.ID][]ma.Multiaddr), names: names, left: make(map[peer.ID]chan struct{})}
	for _, s := range addrs {
		info, err := parseBootstrap(s)
		if err != nil {
			return nil, fmt.Errorf("bootstrap %s: %w", s, err)
		}
		f.members[info.ID] = append(f.members[info.ID], info.Addrs...)
		names.add(info.Addrs...)
		f.left[info.ID] = make(chan struct{}, 1)
	}
	return f, nil
}

// follow prepares f to dial from h, before h listens.
func (f *federation) follow(h host.Host) {
	f.host = h
	h.Network().Notify(&network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		select {
		case f.left[c.RemotePeer()] <- struct{}{}: // no relay: nil, which takes none
		default:
		}
	}})
}

// connect keeps a connection to each relay until close. It does not wait for any.
func (f *federation) connect() {
	var ctx context.Context
	ctx, f.cancel = context.WithCancel(context.Background())
	for id := range f.members {
		f.keeping.Go(func() { f.keep(ctx, id) }) // close waits for it
	}
}

func (f *federation) close() {
	if f.cancel != nil {
		f.cancel()
		f.keeping.Wait()
	}
}

// keep connects to a relay, again whenever it has left.
func (f *federation) keep(ctx context.Context, id peer.ID) {
	retry, missed := minRetry, false
	for {
		// We wait between attempts ourselves, so libp2p shall not.
		f.host.Network().(*swarm.Swarm).Backoff().Clear(id)
		dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
		err := f.host.Connect(dialCtx, peer.AddrInfo{ID: id})
		cancel()
		if err == nil {
			settled := time.After(settleTime)
			for ctx.Err() == nil && f.connected(id) {
				select {
				case <-ctx.Done():
				case <-f.left[id]:
				case <-settled:
					f.log.Info("other relay connected", "peer", id)
					retry, missed = minRetry, false
				}
			}
			err = errors.New("it has left")
		}
		if ctx.Err() != nil {
			return
		}
		// Warn once, until it is there again. Of a name that does not resolve, names warns.
		if !missed && slices.ContainsFunc(f.addrs(id), func(a ma.Multiaddr) bool { return !isDNS(a) }) {
			missed = true
			f.log.Warn("other relay not connected, trying again", "peer", id, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		// Up to a quarter more, so that two relays that have lost each other do
		// not keep dialling at the same time.
		case <-time.After(retry + rand.N(retry/4)):
			retry = min(2*retry, maxRetry)
		}
	}
}

// addrs returns the addresses of another relay: IP addresses first, which clients can
// dial, then names. There are none of a peer that is no relay.
func (f *federation) addrs(id peer.ID) []ma.Multiaddr { return f.names.withIPs(f.members[id]) }

func (f *federation) connected(id peer.ID) bool {
	return f.host.Network().Connectedness(id) == network.Connected
}

// federation is the connection gater too: every dial fails but those to other
// relays. Addresses come from clients, and a relay that dialled those would scan
// ports for anyone.
func (f *federation) InterceptPeerDial(id peer.ID) bool                 { return f.members[id] != nil }
func (f *federation) InterceptAddrDial(id peer.ID, _ ma.Multiaddr) bool { return f.members[id] != nil }
func (*federation) InterceptAccept(network.ConnMultiaddrs) bool         { return true }
func (*federation) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (*federation) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
