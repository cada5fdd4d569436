package main

// The other relays that the operator named (--bootstrap), which are the only hosts
// that this one dials. It stays connected to each; its answers name them, so that
// clients look and publish there as well; and it asks them for clients of theirs.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/encoding/protodelim"
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

	// findTimeout is how long an answer may wait for what other relays know. A
	// client gives a request 10 s.
	findTimeout = 2 * time.Second

	// foundAge is how long an answer is cached, "not found" included; foundPeers is
	// for how many peers.
	foundAge   = 10 * time.Second
	foundPeers = 4096

	// maxFinding is how many requests to other relays may run at once. Further
	// answers do without, so that a flood here does not become one there.
	maxFinding = 64
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

	found   *lru.Cache[peer.ID, foundAddrs]
	finding chan struct{} // holds a value for each request that runs
}

// foundAddrs is a cached answer of other relays.
type foundAddrs struct {
	addrs []ma.Multiaddr
	at    time.Time
}

// newFederation takes addresses that parseBootstrap accepts; several of one relay
// are several ways to it.
func newFederation(addrs []string, names *names, log *slog.Logger) (*federation, error) {
	found, err := lru.New[peer.ID, foundAddrs](foundPeers)
	if err != nil {
		panic(err) // only for a size below one
	}
	f := &federation{
		log:     log,
		members: make(map[peer.ID][]ma.Multiaddr),
		names:   names,
		left:    make(map[peer.ID]chan struct{}),
		found:   found,
		finding: make(chan struct{}, maxFinding),
	}
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

// follow prepares f for requests of h's clients, before h listens.
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

// find returns the address at which another relay sees the client, then those on
// which the client says that it listens; or none, if no other relay knows it.
func (f *federation) find(id peer.ID) []ma.Multiaddr {
	if len(f.members) == 0 || f.members[id] != nil {
		return nil
	}
	if _, err := peer.IDFromBytes([]byte(id)); err != nil || len(id) > maxPeerID {
		return nil // any bytes can be asked for
	}
	if known, ok := f.found.Get(id); ok && time.Since(known.at) < foundAge {
		return known.addrs
	}
	select {
	case f.finding <- struct{}{}:
		defer func() { <-f.finding }()
	default:
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), findTimeout)
	defer cancel()
	answers := make(chan []ma.Multiaddr, len(f.members))
	asked := 0
	for relay := range f.members {
		if f.connected(relay) {
			asked++
			go func() { answers <- f.ask(ctx, relay, id) }() // until ctx is done
		}
	}
	var addrs []ma.Multiaddr
	for ; asked > 0 && len(addrs) == 0; asked-- {
		addrs = <-answers
	}
	f.found.Add(id, foundAddrs{addrs, time.Now()})
	return addrs
}

// ask asks one relay for a client's addresses, with FIND_NODE. If the relay does not
// answer, there are none.
func (f *federation) ask(ctx context.Context, relay, id peer.ID) []ma.Multiaddr {
	s, err := f.host.NewStream(network.WithNoDial(ctx, "find"), relay, kadProtocol)
	if err != nil {
		return nil
	}
	defer s.Reset()
	defer context.AfterFunc(ctx, func() { s.Reset() })()
	resp := new(kadpb.Message)
	_, err = protodelim.MarshalTo(s, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(id), 0))
	if err == nil {
		err = protodelim.UnmarshalOptions{MaxSize: maxKadMessage}.UnmarshalFrom(bufio.NewReader(s), resp)
	}
	if err != nil {
		f.log.Debug("other relay did not answer", "peer", relay, "err", err)
		return nil
	}
	for _, p := range resp.CloserPeers {
		if peer.ID(p.Id) == id && len(p.Addresses()) > 0 {
			// An answer begins with where the client was observed, and so does ours.
			addrs, via := p.Addresses(), s.Conn().RemoteMultiaddr()
			return fitAddrs(usableAddrs(id, addrs[:1], via), usableAddrs(id, addrs[1:], via))
		}
	}
	return nil
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
