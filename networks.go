package main

// Where clients are now, and how many connections each network has.
//
// A client's address changes while it is connected: its home gets a new one, its
// carrier's NAT forgets it, it leaves the Wi-Fi. quic-go follows once the new address
// is validated (RFC 9000, 9), and libp2p does not: to libp2p a connection stays where it
// began. Here is what makes both agree.

import (
	"errors"
	"io"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	"github.com/libp2p/go-libp2p/x/rate"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
)

// whereIs returns the validated address from which c's packets come now.
func whereIs(c *quic.Conn) netip.AddrPort { return addrPort(c.RemoteAddr()) }

// followingTransport is a QUIC transport whose incoming connections have the address
// where their clients are now as RemoteMultiaddr. What is told of a client, and what a
// client is told of itself (identify's observed address), is taken from there.
type followingTransport struct{ transport.Transport }

func (t followingTransport) Listen(at ma.Multiaddr) (transport.Listener, error) {
	l, err := t.Transport.Listen(at)
	if err != nil {
		return nil, err
	}
	return followingListener{l}, nil
}

func (t followingTransport) Close() error { return t.Transport.(io.Closer).Close() }

type followingListener struct{ transport.Listener }

func (l followingListener) Accept() (transport.CapableConn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	f := &followingConn{CapableConn: c}
	if !c.As(&f.quic) {
		return c, nil
	}
	return f, nil
}

type followingConn struct {
	transport.CapableConn
	quic *quic.Conn
	at   atomic.Pointer[remoteAddr] // nil: nobody has asked
}

// remoteAddr is an address in two forms.
type remoteAddr struct {
	netip.AddrPort
	addr ma.Multiaddr
}

func (c *followingConn) RemoteMultiaddr() ma.Multiaddr {
	now := whereIs(c.quic)
	if at := c.at.Load(); at != nil && at.AddrPort == now {
		return at.addr
	}
	addr, err := quicreuse.ToQuicMultiaddr(c.quic.RemoteAddr(), quic.Version1)
	if err != nil {
		return c.CapableConn.RemoteMultiaddr() // no UDP address, which is impossible
	}
	c.at.Store(&remoteAddr{now, addr})
	return addr
}

// followInterval is how often networks looks where clients that move are now.
const followInterval = 500 * time.Millisecond

// networks counts the connections of each network. go-libp2p's resource manager counts
// them where they began, so that one address could hold any number (750 in a test): each
// began elsewhere, and moved. Here a connection's place moves with it, and where there is
// none left the connection is closed.
//
// The zero value has room for all. follow and close may be called once each.
type networks struct {
	tally *tally
	most  int            // connections of one network; 0: any number
	free  []netip.Prefix // networks that have room for all

	// unproven limits connections that begin without a proof of their address. nil: not.
	unproven *rate.Limiter

	stop chan struct{} // nil: follow was not called
	done chan struct{}

	mu    sync.Mutex
	conns map[netip.Prefix]int

	// moving has the places of clients that may have another address now. A place stays for
	// two looks, because quic-go tells of a move a moment before it follows. The value says
	// whether the first look is over.
	moving map[*networkPlace]bool
}

// networkPlace is the place of a connection in a network. take makes it; call leave once the
// connection is closed.
type networkPlace struct {
	networks *networks
	network  netip.Prefix // zero: one that has room for all
	conn     *quic.Conn   // nil: still in the handshake, where no client moves
	left     bool
}

var errNetworkFull = errors.New("no more connections from that network")

// take returns a place for a connection from addr, or errNetworkFull.
func (n *networks) take(addr netip.Addr) (*networkPlace, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := &networkPlace{networks: n}
	if !n.enter(p, n.counted(addr)) {
		return nil, errNetworkFull
	}
	return p, nil
}

// doubts reports whether a newcomer has to prove that addr is its own.
func (n *networks) doubts(addr netip.Addr) bool { return n.unproven != nil && !n.unproven.Allow(addr) }

// counted returns the network in which connections from addr are counted.
func (n *networks) counted(addr netip.Addr) netip.Prefix {
	if n.most == 0 || slices.ContainsFunc(n.free, func(f netip.Prefix) bool { return f.Contains(addr) }) {
		return netip.Prefix{}
	}
	return networkOf(addr)
}

// enter and exit are called with the lock held.
func (n *networks) enter(p *networkPlace, network netip.Prefix) bool {
	if network.IsValid() {
		if n.conns[network] >= n.most {
			return false
		}
		if n.conns == nil {
			n.conns = make(map[netip.Prefix]int)
		}
		n.conns[network]++
	}
	p.network = network
	return true
}

func (n *networks) exit(p *networkPlace) {
	if !p.network.IsValid() {
		return
	}
	if n.conns[p.network]--; n.conns[p.network] == 0 {
		delete(n.conns, p.network)
	}
	p.network = netip.Prefix{}
}

// belongs says whose the place is.
func (p *networkPlace) belongs(c *quic.Conn) {
	p.networks.mu.Lock()
	defer p.networks.mu.Unlock()
	p.conn = c
}

// moves says that quic-go is about to send to another address of the client. The place
// follows at the next look.
func (p *networkPlace) moves() {
	n := p.networks
	n.mu.Lock()
	defer n.mu.Unlock()
	if p.left {
		return
	}
	if n.moving == nil {
		n.moving = make(map[*networkPlace]bool)
	}
	n.moving[p] = false
}

func (p *networkPlace) leave() {
	p.networks.mu.Lock()
	defer p.networks.mu.Unlock()
	p.networks.exit(p)
	p.left = true
	delete(p.networks.moving, p)
}

// follow moves places until close.
func (n *networks) follow() {
	n.stop, n.done = make(chan struct{}), make(chan struct{})
	go func() { // close waits for it
		defer close(n.done)
		tick := time.NewTicker(followInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				n.move()
			case <-n.stop:
				return
			}
		}
	}()
}

func (n *networks) close() {
	if n.stop != nil {
		close(n.stop)
		<-n.done
		n.stop = nil
	}
}

// move gives each connection that has moved a place where its client is now, and a budget
// of the network there. It closes those for which there is no place.
func (n *networks) move() {
	var moved, full []*quic.Conn
	n.mu.Lock()
	for p, again := range n.moving {
		if p.conn == nil {
			continue
		}
		if again {
			delete(n.moving, p)
		} else {
			n.moving[p] = true
		}
		to := n.counted(whereIs(p.conn).Addr())
		if to == p.network {
			continue
		}
		n.exit(p)
		if !n.enter(p, to) {
			delete(n.moving, p)
			full = append(full, p.conn)
		} else {
			moved = append(moved, p.conn)
		}
	}
	n.mu.Unlock()
	for _, c := range moved {
		if account := accountOf(c); account != nil {
			account.moved(whereIs(c).Addr())
		}
	}
	for _, c := range full {
		n.tally.refuse(refusedNetwork)
		c.CloseWithError(quic.ApplicationErrorCode(network.ConnResourceLimitExceeded), "")
	}
}
