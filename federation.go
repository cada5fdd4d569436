package main

// The other relays: those that the operator named (--bootstrap), and those that other
// relays vouch for. This relay dials them and no other host, and stays connected to each.
// Its answers tell a client which of them keep the record of the client's group.
//
// A relay vouches for the relays that its own operator named, and for no others. Each
// relay asks those that it knows, then those that they vouch for, and so on. So a relay
// that names one other learns of all, and a relay that one other names becomes known to
// all. Nobody gets in by asking. But each operator trusts the operators of the relays that
// he named to choose further ones. The log says who vouches for whom. If an operator takes
// a name back and restarts his relay, all others drop that relay, too, unless somebody
// else vouches for it.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	kbucket "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/multiformats/go-multistream"
	"golang.org/x/time/rate"
)

const (
	// dialTimeout bounds one attempt to connect to a relay. The next attempt follows
	// after minRetry, and the wait doubles each time, up to maxRetry. So a relay that is
	// back may stay unnoticed for 30 s, which is how often clients look. The wait is
	// minRetry again once a connection has lasted for settleTime. A shorter one does not
	// count, because some are accepted and closed at once.
	dialTimeout = 15 * time.Second
	settleTime  = 5 * time.Second
	minRetry    = time.Second
	maxRetry    = 30 * time.Second

	// vouchedDials limits how many relays that only others vouch for are dialled per second,
	// after the first maxRelays. It is enough for maxRelays that are all down. Whoever runs a
	// relay chooses the addresses of those for which it vouches. Without the limit, one that
	// gave a new list each time that it was asked, which was whenever one of its connections
	// ended, had this relay send 4.6 MB/s to a victim, 19 times what it sent itself.
	vouchedDials = 2

	// vouchTimeout bounds the question which relays another one vouches for. It is asked
	// when that relay connects, and then every vouchAge. This is as often as names are
	// looked up, because the addresses in the answer may come from a name.
	vouchTimeout = 10 * time.Second
	vouchAge     = nameRefresh
)

// federation keeps the other relays. Make it with newFederation, call follow before the
// host listens and connect after that. close ends it.
type federation struct {
	log   *slog.Logger
	peers *peers
	names *names // looks up the DNS names in named

	self  peer.ID
	named []peer.AddrInfo // by the operator: each relay once, with the addresses as he wrote them

	host    host.Host
	ctx     context.Context // of the goroutines that run keep; nil before connect
	cancel  context.CancelFunc
	keeping sync.WaitGroup

	pace *rate.Limiter // of dials to relays that others vouch for

	mu      sync.Mutex
	vouched map[peer.ID][]peer.AddrInfo // for whom each relay vouched when it was last asked
	others  atomic.Pointer[map[peer.ID]*otherRelay]
}

// otherRelay describes a relay that this one knows. It is replaced, never changed.
type otherRelay struct {
	addrs   []ma.Multiaddr     // as the operator wrote them, or as relays say
	voucher peer.ID            // the nearest relay that vouches for it; "" if the operator named it
	left    chan struct{}      // gets a value when the relay may have left
	stop    context.CancelFunc // ends keep; nil while keep does not run
}

// newFederation makes a federation of the relays at addrs, each of which parseBootstrap
// accepts. Several addresses of one relay are several ways to it. It fails if one of them
// is an address of this relay, self.
func newFederation(self peer.ID, addrs []string, peers *peers, names *names, log *slog.Logger) (*federation, error) {
	named, err := parseRelays(addrs)
	if err != nil {
		return nil, fmt.Errorf("bootstrap %w", err)
	}
	f := &federation{
		log: log, peers: peers, names: names, named: named,
		self: self, pace: rate.NewLimiter(vouchedDials, maxRelays), vouched: make(map[peer.ID][]peer.AddrInfo),
	}
	for _, info := range named {
		if info.ID == self {
			return nil, fmt.Errorf("bootstrap: %s is this relay", self)
		}
		names.add(info.Addrs...)
	}
	f.others.Store(&map[peer.ID]*otherRelay{})
	f.gather()
	return f, nil
}

// parseRelays reads addresses as --bootstrap takes them. It returns each relay once.
func parseRelays(addrs []string) (relays []peer.AddrInfo, err error) {
	for _, s := range addrs {
		info, err := parseBootstrap(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s, err)
		}
		i := slices.IndexFunc(relays, func(r peer.AddrInfo) bool { return r.ID == info.ID })
		if i < 0 {
			i, relays = len(relays), append(relays, peer.AddrInfo{ID: info.ID})
		}
		relays[i].Addrs = append(relays[i].Addrs, info.Addrs...)
	}
	return relays, nil
}

// gather works out which relays there are: those that the operator named, those that
// they vouch for, and so on, up to maxRelays. The nearest come first, so those that are
// further away cannot take their places. After connect, it also starts keep for new
// relays, and ends it for those that are gone. The caller holds f.mu, unless nobody else
// has f yet.
func (f *federation) gather() {
	before, others := *f.others.Load(), make(map[peer.ID]*otherRelay)
	var order []peer.ID
	surplus := 0
	add := func(info peer.AddrInfo, voucher peer.ID) {
		o := others[info.ID]
		switch {
		case info.ID == f.self:
		case o != nil && o.voucher != "":
			o.addrs = fitAddrs(o.addrs, info.Addrs)
		case o != nil: // the operator's own addresses stand
		case len(others) == maxRelays:
			surplus++
		default:
			if voucher != "" {
				info.Addrs = fitAddrs(info.Addrs)
			}
			o = &otherRelay{addrs: info.Addrs, voucher: voucher, left: make(chan struct{}, 1)}
			if b := before[info.ID]; b != nil {
				o.left, o.stop = b.left, b.stop
			}
			others[info.ID], order = o, append(order, info.ID)
		}
	}
	for _, info := range f.named {
		add(info, "")
	}
	for i := 0; i < len(order); i++ {
		for _, info := range f.vouched[order[i]] {
			add(info, order[i])
		}
	}
	f.others.Store(&others)
	if f.ctx == nil {
		return
	}
	if surplus > 0 {
		f.log.Warn("too many other relays, the furthest are left out", "known", len(others), "left_out", surplus)
	}
	for _, id := range order {
		o := others[id]
		if o.voucher != "" && (before[id] == nil || before[id].voucher != o.voucher) {
			f.log.Info("other relay vouched for", "peer", id, "vouched_for_by", o.voucher, "addrs", o.addrs)
		}
		if o.stop == nil {
			var ctx context.Context
			ctx, o.stop = context.WithCancel(f.ctx)
			f.keeping.Go(func() { f.keep(ctx, id, o.left) }) // close waits for it
		}
	}
	for id, b := range before {
		if others[id] == nil {
			f.log.Info("other relay no longer vouched for", "peer", id)
			delete(f.vouched, id)
			b.stop()
		}
	}
}

// follow prepares f to dial from h, before h listens. If the operator named no relay, it
// registers no protocol, so clients see the same ones as at the old relay.
func (f *federation) follow(h host.Host) {
	f.host = h
	if len(f.named) > 0 {
		h.SetStreamHandler(vouchProtocol, f.vouch)
	}
	h.Network().Notify(&network.NotifyBundle{DisconnectedF: func(_ network.Network, c network.Conn) {
		if o := f.get(c.RemotePeer()); o != nil {
			select {
			case o.left <- struct{}{}:
			default:
			}
		}
	}})
}

// connect keeps a connection to each relay until close. It does not wait for any.
func (f *federation) connect() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.gather()
}

func (f *federation) close() {
	if f.cancel != nil {
		f.cancel()
		f.keeping.Wait()
	}
}

// keep stays connected to a relay until ctx ends: it connects again whenever the relay
// has left. It also asks the relay for whom it vouches.
func (f *federation) keep(ctx context.Context, id peer.ID, left <-chan struct{}) {
	retry, missed := minRetry, false
	for {
		// We wait between attempts ourselves, so libp2p must not.
		f.host.Network().(*swarm.Swarm).Backoff().Clear(id)
		// Reserve no turn: a relay for which nobody vouches any more would take that of another.
		for o := f.get(id); o != nil && o.voucher != "" && !f.pace.Allow(); o = f.get(id) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(minRetry + rand.N(minRetry)):
			}
		}
		dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
		err := f.host.Connect(dialCtx, peer.AddrInfo{ID: id})
		cancel()
		if err == nil {
			settled, askNow := time.After(settleTime), time.After(0)
			for ctx.Err() == nil && f.peers.connected(id) {
				select {
				case <-ctx.Done():
				case <-left: // and may be back already, after a restart
					askNow = time.After(settleTime)
				case <-askNow:
					if err := f.ask(ctx, id); err != nil {
						f.log.Debug("other relay not asked", "peer", id, "err", err)
					}
					askNow = time.After(vouchAge)
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
		// Warn once, until it is there again. If its name does not resolve, names warns.
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

// ask asks a relay for whom it vouches, and has gather take the answer in. If there is no
// answer, or none that makes sense, the last one stands.
func (f *federation) ask(ctx context.Context, id peer.ID) error {
	ctx, cancel := context.WithTimeout(ctx, vouchTimeout)
	defer cancel()
	relays, err := f.read(ctx, id)
	if err != nil && !errors.As(err, new(multistream.ErrNotSupported[protocol.ID])) { // it names nobody
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	same := func(a, b peer.AddrInfo) bool {
		return a.ID == b.ID && slices.EqualFunc(a.Addrs, b.Addrs, ma.Multiaddr.Equal)
	}
	if f.get(id) != nil && !slices.EqualFunc(f.vouched[id], relays, same) {
		f.vouched[id] = relays
		f.gather()
	}
	return nil
}

// read asks a relay by vouchProtocol and returns its answer, which may be empty.
func (f *federation) read(ctx context.Context, id peer.ID) ([]peer.AddrInfo, error) {
	s, err := f.host.NewStream(network.WithNoDial(ctx, ""), id, vouchProtocol)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	defer context.AfterFunc(ctx, func() { s.Reset() })() // ends what waits for the answer
	text, err := io.ReadAll(io.LimitReader(s, maxVouched+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxVouched {
		return nil, fmt.Errorf("answer is above %d bytes", maxVouched)
	}
	return parseRelays(strings.Fields(string(text)))
}

// vouch answers vouchProtocol. Anyone may ask, since clients are told of the same relays.
func (f *federation) vouch(s network.Stream) {
	defer s.Close()
	s.SetDeadline(time.Now().Add(answerTimeout))
	var text bytes.Buffer
	for _, info := range f.named {
		for _, a := range f.told(info.ID) {
			fmt.Fprintf(&text, "%s/p2p/%s\n", a, info.ID)
		}
	}
	s.Write(text.Bytes()) // if it fails, the other asks again
}

// keepers returns the relays that keep the record with that key, without this one. The
// record is kept by the groupRelays relays that are closest to the key, by XOR distance as
// in Kademlia. Relays that are not connected are passed over. So all relays that are
// connected to each other choose the same keepers, and the devices of a group meet there,
// whichever relays they know.
func (f *federation) keepers(key []byte) []peer.ID {
	relays := []peer.ID{f.self}
	for id := range *f.others.Load() {
		if f.peers.connected(id) {
			relays = append(relays, id)
		}
	}
	closest := kbucket.SortClosestPeers(relays, kbucket.ConvertKey(string(key)))
	closest = closest[:min(len(closest), groupRelays)]
	return slices.DeleteFunc(closest, func(id peer.ID) bool { return id == f.self })
}

// counts returns how many other relays there are, and how many of them are connected.
func (f *federation) counts() (known, connected int) {
	others := *f.others.Load()
	for id := range others {
		if f.peers.connected(id) {
			connected++
		}
	}
	return len(others), connected
}

// told returns the addresses of another relay that clients and relays are told: first
// those from which it is connected, then addrs, then the public ones that it reports. The
// last help those who have IPv6 alone if the operator wrote an IPv4 address.
func (f *federation) told(id peer.ID) []ma.Multiaddr {
	at := f.peers.observed(id)
	public := slices.DeleteFunc(f.peers.listening(id, at), func(a ma.Multiaddr) bool { return !isQUICAddr(a) || !manet.IsPublicAddr(a) })
	return fitAddrs(at, f.addrs(id), public)
}

// addrs returns the addresses of another relay: first IP addresses, which clients can
// dial, then names. It returns none for a peer that is no relay.
func (f *federation) addrs(id peer.ID) []ma.Multiaddr {
	if o := f.get(id); o != nil {
		return f.names.withIPs(o.addrs)
	}
	return nil
}

// get returns what is known of another relay, or nil if that peer is no relay.
func (f *federation) get(id peer.ID) *otherRelay { return (*f.others.Load())[id] }

// federation is the connection gater, too: every dial fails, except to other relays.
// Addresses come from clients, and a relay that dialled them would scan ports for anyone.
func (f *federation) InterceptPeerDial(id peer.ID) bool                 { return f.get(id) != nil }
func (f *federation) InterceptAddrDial(id peer.ID, _ ma.Multiaddr) bool { return f.get(id) != nil }
func (*federation) InterceptAccept(network.ConnMultiaddrs) bool         { return true }
func (*federation) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (*federation) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
