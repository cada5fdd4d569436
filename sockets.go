package main

// The QUIC sockets: how they are configured where libp2p takes no option for it,
// with which keys, and how a crowd of new connections is let in.

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	xipv4 "golang.org/x/net/ipv4"
	xipv6 "golang.org/x/net/ipv6"
	"golang.org/x/time/rate"
)

const (
	// packetSize is what every path must carry in one UDP datagram (RFC 9000,
	// 14.1), in bytes. By default quic-go begins with 1280 and never goes below,
	// so that no handshake ends on a path with an MTU of 1280, as some tunnels
	// and mobile networks have. Where the path carries more, discovery finds out.
	packetSize = 1200

	// wantedBuffer is what quic-go asks the kernel for, receiving and sending, in
	// bytes, and below which it calls what socketBuffers says small:
	// desiredBufferSize in its sys_conn_buffers.go.
	wantedBuffer = 7 << 20

	// handshakeRate is how many connections may begin per second before
	// newcomers have to prove their address by a Retry first (RFC 9000, 8.1.2).
	// It is what libp2p has.
	handshakeRate = 1000

	// acceptQueue is how many connections may wait, their handshakes done, for
	// libp2p to take them: a crowd that comes back when the relay has restarted.
	acceptQueue = 1024

	// acceptors is how many goroutines wait for a connection on each socket.
	// quic-go refuses what comes when 32 are waiting for one of them, which a
	// single one, on a busy machine, lets happen.
	acceptors = 256
)

// quicSockets are the UDP sockets on which libp2p listens. It can bind its own,
// but takes the QUIC configuration from nobody: these it borrows. Add
// newTransport to the network, bind before listening, and close at the end.
type quicSockets struct {
	tally   *tally
	manager *quicreuse.ConnManager
	reset   quic.StatelessResetKey
	token   quic.TokenGeneratorKey

	admit  func(context.Context, *quic.ClientInfo) (context.Context, error)
	verify func(net.Addr) bool

	// unproven is how many connections have begun from addresses that are not
	// proven, and are not libp2p's yet. Forged ones stay for 10 s, and take places
	// from newcomers: at maxUnproven newcomers have to prove theirs.
	unproven    atomic.Int64
	maxUnproven int64

	// tap, if there is one, is called with each socket as it is bound, and returns
	// what is shown all that arrives there before quic-go is. ids then makes the
	// connection IDs by which it tells what is for this host.
	tap func(udpSocket) tapped
	ids quic.ConnectionIDGenerator

	// testOnlyPlain uses the sockets of the other systems on Linux.
	testOnlyPlain bool

	bound []*quic.Transport
}

// udpSocket is a UDP socket as quic-go uses it and a tap sends from it.
type udpSocket interface {
	quic.OOBCapablePacketConn

	// show sets what is shown to tap. It is called before the first read.
	show(tapped)

	// send sends datagrams to an address of the socket's family, with these ECN bits,
	// from the address of this machine that from names. They are of size bytes each,
	// but for the last; each of parts begins a new one. Together they are maxSend
	// bytes and maxSegments datagrams at most, unless there is one part. It never
	// waits: what the system does not take is lost, as any packet may be. It may be
	// called by several goroutines.
	send(parts [][]byte, size int, ecn byte, to netip.AddrPort, from source)
}

const (
	// maxSend is what UDP over IPv6 carries in one message, in bytes, and maxSegments
	// how many datagrams a kernel before 6.10 makes of it (UDP_MAX_SEGMENTS).
	maxSend     = 1<<16 - 1 - 40 - 8
	maxSegments = 64
)

// tapped is shown what has arrived, and takes out what is not for quic-go. What
// it is given is its own until it returns.
type tapped func([]arrival)

// arrival is what came from one sender in one message: datagrams of size bytes
// each, but for the last.
type arrival struct {
	from netip.AddrPort // IPv4 addresses are never written as IPv6 ones
	size int
	ecn  byte // the two bits of the IP header (RFC 3168)
	data []byte
}

// source is a control message that says from which address of this machine a
// datagram leaves. nil leaves that to the system.
type source []byte

// sourceOf is the control message for addr. Where the system has none, or addr is
// not valid, it is nil.
func sourceOf(addr netip.Addr) source {
	switch {
	case addr.Is4():
		return (&xipv4.ControlMessage{Src: addr.AsSlice()}).Marshal()
	case addr.Is6():
		return (&xipv6.ControlMessage{Src: addr.AsSlice()}).Marshal()
	}
	return nil
}

// addrPort is addr as an arrival has it. It is not valid if addr is none of UDP's.
func addrPort(addr net.Addr) netip.AddrPort {
	u, ok := addr.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := u.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

func (q *quicSockets) newTransport(key crypto.PrivKey, gater connmgr.ConnectionGater, resources network.ResourceManager) (transport.Transport, error) {
	reset, token, err := quicKeys(key)
	if err != nil {
		return nil, err
	}
	manager, err := q.newManager(reset, token, resources)
	if err != nil {
		return nil, err
	}
	return libp2pquic.NewTransport(key, manager, nil, gater, resources)
}

// quicKeys are the keys of a relay's sockets, the same after each restart: one
// lets a connection that the last process had be ended at once (RFC 9000, 10.3),
// the other accepts the tokens it gave. Both are derived from the identity key as
// libp2p.New does (PrivKeyToStatelessResetKey in its config package, which links
// every transport there is).
func quicKeys(identity crypto.PrivKey) (reset quic.StatelessResetKey, token quic.TokenGeneratorKey, err error) {
	secret, err := identity.Raw()
	if err != nil {
		return reset, token, err
	}
	r, resetErr := hkdf.Key(sha256.New, secret, nil, "libp2p quic stateless reset key", len(reset))
	t, tokenErr := hkdf.Key(sha256.New, secret, nil, "libp2p quic token generator key", len(token))
	copy(reset[:], r)
	copy(token[:], t)
	return reset, token, errors.Join(resetErr, tokenErr)
}

// newManager has the signature that libp2p.QUICReuse takes, too.
func (q *quicSockets) newManager(reset quic.StatelessResetKey, token quic.TokenGeneratorKey, resources network.ResourceManager) (_ *quicreuse.ConnManager, err error) {
	q.reset, q.token = reset, token
	// What libp2p gives its own sockets: a connection is counted before its
	// handshake costs anything, and forged addresses cost others nothing.
	q.admit = func(ctx context.Context, client *quic.ClientInfo) (context.Context, error) {
		addr, err := quicreuse.ToQuicMultiaddr(client.RemoteAddr, quic.Version1)
		if err != nil {
			return ctx, err
		}
		scope, err := resources.OpenConnection(network.DirInbound, false, addr)
		if err != nil {
			if !errors.Is(err, network.ErrResourceLimitExceeded) { // which tally hears of
				q.tally.refuse(refusedNetwork)
			}
			return ctx, err
		}
		context.AfterFunc(ctx, scope.Done)
		waiting, taken := context.WithCancel(ctx)
		if !client.AddrVerified {
			q.unproven.Add(1)
			context.AfterFunc(waiting, func() { q.unproven.Add(-1) })
		}
		return network.WithConnManagementScope(ctx, waitingScope{scope, waiting.Done(), taken}), nil
	}
	handshakes := rate.NewLimiter(handshakeRate, handshakeRate)
	q.verify = func(addr net.Addr) bool {
		return q.unproven.Load() >= q.maxUnproven || !handshakes.Allow() || resources.VerifySourceAddress(addr)
	}
	q.manager, err = quicreuse.NewConnManager(reset, token)
	return q.manager, err
}

// bind makes the socket for a later Listen on the same family ("udp4", "udp6")
// and port, all addresses.
func (q *quicSockets) bind(family string, port int) error {
	conn, err := net.ListenUDP(family, &net.UDPAddr{Port: port})
	if err != nil {
		return err
	}
	open := newUDPSocket
	if q.testOnlyPlain {
		open = newPlainSocket
	}
	socket := open(conn)
	tr := &quic.Transport{
		Conn:                socket,
		StatelessResetKey:   &q.reset,
		TokenGeneratorKey:   &q.token,
		ConnContext:         q.admit,
		VerifySourceAddress: q.verify,
	}
	if q.tap != nil {
		socket.show(q.tap(socket))
		tr.ConnectionIDGenerator = q.ids
	}
	q.bound = append(q.bound, tr)
	_, err = q.manager.LendTransport(family, lentTransport{tr}, conn)
	return err
}

// buffers are the sizes of the smallest receive and send buffer of the bound
// sockets, in bytes. They are set once libp2p listens. 0 is unknown.
func (q *quicSockets) buffers() (receive, send int) {
	for i, tr := range q.bound {
		raw, err := tr.Conn.(quic.OOBCapablePacketConn).SyscallConn()
		if err != nil {
			return 0, 0
		}
		r, s := socketBuffers(raw)
		if i == 0 {
			receive, send = r, s
		}
		receive, send = min(receive, r), min(send, s)
	}
	return receive, send
}

// close is called when nothing listens any more. The zero value may be closed,
// and any other one more than once.
func (q *quicSockets) close() error {
	var errs []error
	if q.manager != nil {
		errs = append(errs, q.manager.Close())
	}
	for _, tr := range q.bound {
		errs = append(errs, tr.Close(), tr.Conn.Close())
	}
	q.manager, q.bound = nil, nil
	return errors.Join(errs...)
}

// lentTransport has a relay's QUIC configuration.
type lentTransport struct{ *quic.Transport }

func (t lentTransport) Listen(tlsConf *tls.Config, conf *quic.Config) (quicreuse.QUICListener, error) {
	l, err := t.Transport.Listen(tlsConf, tuned(conf))
	if err != nil {
		return nil, err
	}
	return newPacedListener(l), nil
}

func (t lentTransport) Dial(ctx context.Context, addr net.Addr, tlsConf *tls.Config, conf *quic.Config) (*quic.Conn, error) {
	return t.Transport.Dial(ctx, addr, tlsConf, tuned(conf))
}

func tuned(conf *quic.Config) *quic.Config {
	conf = conf.Clone()
	conf.InitialPacketSize = packetSize
	conf.InitialStreamReceiveWindow = initialWindow
	conf.InitialConnectionReceiveWindow = initialWindow
	conf.MaxStreamReceiveWindow = maxWindow
	conf.MaxConnectionReceiveWindow = maxWindow * 3 / 2
	conf.MaxIncomingStreams = maxIncomingStreams
	// libp2p speaks neither over QUIC by itself, only WebTransport does. Nobody
	// would read them here, and each client could fill a queue.
	conf.MaxIncomingUniStreams = -1
	conf.EnableDatagrams = false
	return conf
}

// waitingScope tells when libp2p takes a connection that was handed to it: it
// then says whose it is.
type waitingScope struct {
	network.ConnManagementScope
	over  <-chan struct{} // closed when it is taken, or the connection has ended
	taken context.CancelFunc
}

func (s waitingScope) SetPeer(id peer.ID) error {
	s.taken()
	return s.ConnManagementScope.SetPeer(id)
}

// pacedListener keeps connections that come faster than libp2p takes them, where
// libp2p would close the 17th with "queue full".
type pacedListener struct {
	*quic.Listener
	queue  chan *quic.Conn // closed when the listener is
	handed <-chan struct{} // closed when libp2p has taken the last one
	closed chan struct{}
	close  func()
}

func newPacedListener(l *quic.Listener) *pacedListener {
	p := &pacedListener{Listener: l, queue: make(chan *quic.Conn, acceptQueue), closed: make(chan struct{})}
	p.close = sync.OnceFunc(func() { close(p.closed) })
	var accepting sync.WaitGroup
	for range acceptors {
		accepting.Go(func() { // until the listener is closed
			for {
				conn, err := l.Accept(context.Background())
				if err != nil {
					return
				}
				select {
				case p.queue <- conn:
				case <-p.closed: // and soon the transport, with all its connections
					return
				}
			}
		})
	}
	go func() {
		accepting.Wait()
		close(p.queue)
	}()
	return p
}

// Accept has one caller, libp2p's loop, which must not be given the next one
// before it has found room for the last.
func (l *pacedListener) Accept(ctx context.Context) (*quic.Conn, error) {
	if l.handed != nil {
		select {
		case <-l.handed:
		case <-l.closed:
		}
	}
	conn, ok := <-l.queue
	if !ok {
		return nil, quic.ErrServerClosed
	}
	l.handed = nil
	if scope, err := network.UnwrapConnManagementScope(conn.Context()); err == nil {
		l.handed = scope.(waitingScope).over
	}
	return conn, nil
}

func (l *pacedListener) Close() error {
	l.close()
	return l.Listener.Close()
}

// listen binds the UDP port on IPv4 and IPv6. A machine without one of them is
// worth a warning; a port that is taken is an error.
func (r *relay) listen(port int, log *slog.Logger) error {
	for _, family := range []struct{ name, network, addr string }{
		{"IPv4", "udp4", "/ip4/0.0.0.0/udp/%d/quic-v1"},
		{"IPv6", "udp6", "/ip6/::/udp/%d/quic-v1"},
	} {
		// Whether any port can be bound tells the two apart on every system.
		probe, err := net.ListenPacket(family.network, ":0")
		if err != nil {
			log.Warn("no "+family.name+" on this machine, clients can't reach it that way", "err", err)
			continue
		}
		probe.Close()
		if err := r.sockets.bind(family.network, port); err != nil {
			return fmt.Errorf("bind UDP port %d on %s: %w", port, family.name, err)
		}
		if err := r.host.Network().Listen(ma.StringCast(fmt.Sprintf(family.addr, port))); err != nil {
			return fmt.Errorf("listen on UDP port %d on %s: %w", port, family.name, err)
		}
	}
	bound := r.host.Network().ListenAddresses()
	if len(bound) == 0 {
		return errors.New("neither IPv4 nor IPv6 on this machine")
	}
	// Switched off by sysctl, IPv6 can still be bound, but no interface has it.
	addrs, err := r.host.Network().InterfaceListenAddresses()
	if err != nil {
		return fmt.Errorf("list interface addresses: %w", err)
	}
	if !slices.ContainsFunc(addrs, func(a ma.Multiaddr) bool { return a[0].Protocol().Code == ma.P_IP6 }) {
		log.Warn("no interface has an IPv6 address, clients can't reach it that way")
	}
	r.host.Network().Notify(&network.NotifyBundle{ListenCloseF: func(_ network.Network, a ma.Multiaddr) {
		select { // when the host closes there is nobody to tell, and no need
		case r.failed <- fmt.Errorf("listener on %s stopped", a):
		default:
		}
	}})
	return nil
}

// freePort finds a UDP port for both families, as they share one number.
func freePort() (int, error) {
	conn, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).Port, nil
}
