package main

// The other relays that the operator named (--bootstrap): the only hosts that
// this one dials. It stays connected to each, names them in its answers, so that
// clients look and publish there as well, and asks them for clients of theirs.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/expirable"
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
	// dialTimeout bounds one attempt to connect to a relay. An attempt that
	// fails is repeated after minRetry, and then after twice as long each time,
	// up to maxRetry, until a connection has lasted for settleTime: some are taken
	// and ended at once.
	dialTimeout = 15 * time.Second
	settleTime  = 5 * time.Second
	minRetry    = time.Second
	maxRetry    = 5 * time.Minute

	// findTimeout is how long an answer may wait for what other relays know. A
	// client gives a request 10 s.
	findTimeout = 2 * time.Second

	// foundAge is how long what they said is kept, that they know nothing too;
	// foundPeers is of how many peers.
	foundAge   = 10 * time.Second
	foundPeers = 4096

	// maxPeerID is the length of the longest peer ID, in bytes: a key of at most 42
	// bytes as it is, or its SHA-256 (peer-ids spec).
	maxPeerID = 2 + 42

	// maxFinding is how many requests to other relays may run at once. Beyond,
	// an answer does without, so that a flood here is none there.
	maxFinding = 64
)

// relays are the other relays. Make it with newRelays, then call follow, and
// connect when the host listens; close ends it.
type relays struct {
	log   *slog.Logger
	named map[peer.ID][]ma.Multiaddr // as the operator wrote them; not changed

	host    host.Host
	cancel  context.CancelFunc
	keeping sync.WaitGroup
	left    map[peer.ID]chan struct{} // gets a value when the relay may have left

	found   *expirable.LRU[peer.ID, []ma.Multiaddr]
	finding chan struct{} // holds a value for each request that runs
}

// newRelays takes addresses that parseBootstrap accepts; those of one relay are
// several ways to it.
func newRelays(addrs []string, log *slog.Logger) (*relays, error) {
	r := &relays{log: log, named: make(map[peer.ID][]ma.Multiaddr), left: make(map[peer.ID]chan struct{})}
	for _, s := range addrs {
		info, err := parseBootstrap(s)
		if err != nil {
			return nil, fmt.Errorf("bootstrap %s: %w", s, err)
		}
		r.named[info.ID] = append(r.named[info.ID], info.Addrs...)
		r.left[info.ID] = make(chan struct{}, 1)
	}
	return r, nil
}

// follow prepares r for requests of h's clients, before h listens.
func (r *relays) follow(h host.Host) {
	if len(r.named) == 0 {
		return // find has nobody to ask
	}
	r.host = h
	r.found = expirable.NewLRU[peer.ID, []ma.Multiaddr](foundPeers, nil, foundAge) // its goroutine ends with the process
	r.finding = make(chan struct{}, maxFinding)
	h.Network().Notify(&network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		select {
		case r.left[c.RemotePeer()] <- struct{}{}: // no relay: nil, which takes none
		default:
		}
	}})
}

// connect keeps a connection to each relay until close. It does not wait for any.
func (r *relays) connect() {
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(context.Background())
	for id := range r.named {
		r.keeping.Go(func() { r.keep(ctx, id) }) // close waits for it
	}
}

func (r *relays) close() {
	if r.cancel != nil {
		r.cancel()
		r.keeping.Wait()
	}
}

// keep connects to a relay, again whenever it has left.
func (r *relays) keep(ctx context.Context, id peer.ID) {
	retry, missed := minRetry, false
	for {
		// Ours is the waiting between attempts, not libp2p's.
		r.host.Network().(*swarm.Swarm).Backoff().Clear(id)
		dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
		err := r.host.Connect(dialCtx, peer.AddrInfo{ID: id})
		cancel()
		if err == nil {
			settled := time.After(settleTime)
			for ctx.Err() == nil && r.connected(id) {
				select {
				case <-ctx.Done():
				case <-r.left[id]:
				case <-settled:
					r.log.Info("other relay connected", "peer", id)
					retry, missed = minRetry, false
				}
			}
			err = errors.New("it has left")
		}
		if ctx.Err() != nil {
			return
		}
		if !missed { // once, until it is there again
			missed = true
			r.log.Warn("other relay not connected, trying again", "peer", id, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		// Up to a quarter more, so that relays which lost one another do not
		// keep calling at the same time.
		case <-time.After(retry + rand.N(retry/4)):
			retry = min(2*retry, maxRetry)
		}
	}
}

func (r *relays) connected(id peer.ID) bool {
	return r.host.Network().Connectedness(id) == network.Connected
}

// find is under which address another relay sees a client of its own, and then on
// which it listens, as it says. There are none of a peer that none of them knows.
func (r *relays) find(id peer.ID) []ma.Multiaddr {
	if len(r.named) == 0 || r.named[id] != nil {
		return nil
	}
	if _, err := peer.IDFromBytes([]byte(id)); err != nil || len(id) > maxPeerID {
		return nil // any bytes can be asked for
	}
	if addrs, ok := r.found.Get(id); ok {
		return addrs
	}
	select {
	case r.finding <- struct{}{}:
		defer func() { <-r.finding }()
	default:
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), findTimeout)
	defer cancel()
	answers := make(chan []ma.Multiaddr, len(r.named))
	asked := 0
	for relay := range r.named {
		if r.connected(relay) {
			asked++
			go func() { answers <- r.ask(ctx, relay, id) }() // until ctx is done
		}
	}
	var addrs []ma.Multiaddr
	for ; asked > 0 && len(addrs) == 0; asked-- {
		addrs = <-answers
	}
	r.found.Add(id, addrs)
	return addrs
}

// ask asks one relay, with FIND_NODE. No answer is none.
func (r *relays) ask(ctx context.Context, relay, id peer.ID) []ma.Multiaddr {
	s, err := r.host.NewStream(network.WithNoDial(ctx, "find"), relay, kadProtocol)
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
		r.log.Debug("other relay did not answer", "peer", relay, "err", err)
		return nil
	}
	for _, p := range resp.CloserPeers {
		if peer.ID(p.Id) == id && len(p.Addresses()) > 0 {
			// First where it was observed, as answers have it, and so it stays.
			addrs, from := p.Addresses(), s.Conn().RemoteMultiaddr()
			return within(nil, append(usableAddrs(id, addrs[:1], from), usableAddrs(id, addrs[1:], from)...))
		}
	}
	return nil
}

// relays are the connection gater too: it lets every dial fail but those to them.
// Addresses come from clients, and a relay that dialled them would scan ports for
// anyone.
func (r *relays) InterceptPeerDial(id peer.ID) bool                 { return r.named[id] != nil }
func (r *relays) InterceptAddrDial(id peer.ID, _ ma.Multiaddr) bool { return r.named[id] != nil }
func (*relays) InterceptAccept(network.ConnMultiaddrs) bool         { return true }
func (*relays) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (*relays) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
