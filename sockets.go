package main

// The UDP sockets on which QUIC runs: how they are bound, how QUIC is configured
// where libp2p has no option for it, with which keys, and how a crowd of new
// connections is let in.

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlogwriter"
	"golang.org/x/time/rate"
)

const (
	// packetSize is what every path must carry in one UDP datagram (RFC 9000,
	// 14.1), in bytes, and the most that this relay sends in one. By default quic-go
	// begins with 1280, so that no handshake ends on a path with an MTU of 1280, as
	// some tunnels and mobile networks have, and finds out whether the path carries
	// up to 1452.
	//
	// It never goes back, whatever ICMP says: where a path that carried 1500 bytes
	// carries 1280 from one moment on (a tunnel, a line that falls back to another),
	// a connection would stall for good. Rather than that, we send no more than 1200.
	// Measured with 64 circuits on loopback, in turns, where the CPU is the limit: 0.85
	// of the throughput with discovery. (With 1232, which IPv6 carries everywhere, it
	// was 0.88.) Where the line is the limit, headers take 1 % more of it. To close a
	// connection that seems stuck, so that its client comes back, would cost no
	// throughput, but it would end circuits, those of slow clients too.
	packetSize = 1200

	// wantedBuffer is the size of receive and send buffer that quic-go asks the
	// kernel for, in bytes: desiredBufferSize in its sys_conn_buffers.go.
	wantedBuffer = 7 << 20

	// handshakeRate is how many connections may begin per second before newcomers
	// have to prove their address by a Retry first (RFC 9000, 8.1.2). libp2p has
	// the same rate.
	handshakeRate = 1000

	// maxCertificate limits a client's certificate, and maxCertificateRest what it holds
	// beside keys and signatures, both in bytes. A certificate of go-libp2p has at most 176
	// bytes beside them (TestCertificatesOfClients), and 2 441 in all with the largest key,
	// RSA with 8192 bits. The rest has room for 156 names of one byte, which cost 21 KiB.
	maxCertificate     = 4 << 10
	maxCertificateRest = 640

	// maxServerName limits the server name in a client's handshake, in bytes. crypto/tls
	// keeps it as well. A DNS name has no more (RFC 1035, 2.3.4), and the clients send none.
	maxServerName = 255

	// acceptQueue is how many connections may wait after their handshakes until
	// libp2p accepts them: a crowd that comes back when the relay has restarted.
	acceptQueue = 1024

	// acceptors is how many goroutines wait for a connection on each socket. quic-go
	// refuses a connection when 32 wait to be accepted, which happens when a single
	// goroutine does not get its turn soon enough. Measured: of 1 000 clients that came
	// at once, on two cores that were busy otherwise, 4 to 229 were refused with one
	// goroutine, and none with 8 or more.
	acceptors = 32
)

// quicSockets are the UDP sockets on which libp2p listens. libp2p could bind its
// own, but would not let us configure QUIC on them, so it borrows these. Add
// newTransport to the network, then call listen, and close at the end.
type quicSockets struct {
	tally   *tally
	pieces  *pieces
	manager *quicreuse.ConnManager
	reset   quic.StatelessResetKey
	token   quic.TokenGeneratorKey
	tls     *tls.Config // for connections that come in

	admit  func(context.Context, *quic.ClientInfo) (context.Context, error)
	verify func(net.Addr) bool

	// networks has a place for each connection.
	networks networks

	// unproven is how many connections have begun from addresses that nobody has
	// proven, and wait for libp2p to accept them. A forged one stays for 10 s and
	// takes a place from a newcomer. At maxUnproven, newcomers have to prove their
	// addresses.
	unproven    atomic.Int64
	maxUnproven int64

	// tap, if it is not nil, is called with each socket that is bound, and returns the
	// function that sees what arrives there. ids then makes our connection IDs, by which
	// that function tells which packets are for quic-go.
	tap func(udpSocket) tapped
	ids quic.ConnectionIDGenerator

	// testOnlyPlain uses the sockets of the other systems on Linux.
	testOnlyPlain bool

	transports []*quic.Transport // one for each socket
}

// newTransport returns libp2p's QUIC transport over these sockets.
func (q *quicSockets) newTransport(key crypto.PrivKey, gater connmgr.ConnectionGater, resources network.ResourceManager) (transport.Transport, error) {
	reset, token, err := quicKeys(key)
	if err != nil {
		return nil, err
	}
	manager, err := q.newManager(reset, token, resources)
	if err != nil {
		return nil, err
	}
	certificate, err := certificateTemplate()
	if err != nil {
		return nil, err
	}
	identity, err := libp2ptls.NewIdentity(key, libp2ptls.WithCertTemplate(certificate))
	if err != nil {
		return nil, err
	}
	q.tls = serverTLS(identity)
	inner, err := libp2pquic.NewTransport(key, manager, nil, gater, resources)
	return watchedTransport{followingTransport{inner}}, err
}

// quicKeys returns the keys of a relay's sockets, which are the same after each
// restart. One lets us reset connections left over from the previous process (RFC
// 9000, 10.3), the other lets us accept the tokens that it gave. Both are derived
// from the identity key as libp2p.New does (PrivKeyToStatelessResetKey in its config
// package, which would link every transport there is).
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

// newManager prepares q and returns the manager by which libp2p borrows the sockets.
// Its signature is what libp2p.QUICReuse takes.
func (q *quicSockets) newManager(reset quic.StatelessResetKey, token quic.TokenGeneratorKey, resources network.ResourceManager) (_ *quicreuse.ConnManager, err error) {
	q.reset, q.token = reset, token
	// As libp2p does on its own sockets, count a connection before its handshake
	// costs anything, and let forged addresses cost others nothing.
	q.admit = func(ctx context.Context, client *quic.ClientInfo) (context.Context, error) {
		addr, err := quicreuse.ToQuicMultiaddr(client.RemoteAddr, quic.Version1)
		if err != nil {
			return ctx, err
		}
		place, err := q.networks.take(addrPort(client.RemoteAddr).Addr())
		if err != nil {
			q.tally.refuse(refusedNetwork)
			return ctx, err
		}
		scope, err := resources.OpenConnection(network.DirInbound, false, addr)
		if err != nil {
			place.leave()
			if !errors.Is(err, network.ErrResourceLimitExceeded) { // which tally.BlockConn counts
				q.tally.refuse(refusedNetwork)
			}
			return ctx, err
		}
		ctx, scope = q.pieces.begin(ctx, scope, client.RemoteAddr, place.moves)
		waiting := &waitingScope{ConnManagementScope: scope, place: place, over: make(chan struct{})}
		if !client.AddrVerified {
			q.unproven.Add(1)
			waiting.unproven = &q.unproven
		}
		context.AfterFunc(ctx, func() {
			waiting.end()
			scope.Done()
			place.leave()
		})
		return network.WithConnManagementScope(ctx, waiting), nil
	}
	handshakes := rate.NewLimiter(handshakeRate, handshakeRate)
	q.verify = func(addr net.Addr) bool {
		return q.unproven.Load() >= q.maxUnproven || !handshakes.Allow() || q.networks.doubts(addrPort(addr).Addr())
	}
	q.networks.tally = q.tally
	q.networks.follow()
	q.manager, err = quicreuse.NewConnManager(reset, token)
	return q.manager, err
}

// bind opens a socket on all addresses of a family ("udp4" or "udp6"), on which
// libp2p can then listen.
func (q *quicSockets) bind(family string, port int) error {
	conn, err := net.ListenUDP(family, &net.UDPAddr{Port: port})
	if err != nil {
		return err
	}
	open := newUDPSocket
	if q.testOnlyPlain {
		open = newPlainSocket
	}
	socket := newGuardedSocket(open(conn))
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
	q.transports = append(q.transports, tr)
	_, err = q.manager.LendTransport(family, lentTransport{tr, q.pieces.trace, q.tls}, conn)
	return err
}

// buffers returns the sizes of the smallest receive and send buffer of the sockets,
// in bytes. quic-go sets them when libp2p begins to listen. 0 is unknown.
func (q *quicSockets) buffers() (receive, send int) {
	for i, tr := range q.transports {
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

// close is called when nothing listens any more. It may be called on the zero value,
// and more than once.
func (q *quicSockets) close() error {
	q.networks.close()
	var errs []error
	if q.manager != nil {
		errs = append(errs, q.manager.Close())
	}
	for _, tr := range q.transports {
		errs = append(errs, tr.Close(), tr.Conn.Close())
	}
	q.manager, q.transports = nil, nil
	return errors.Join(errs...)
}

// lentTransport is a transport on which QUIC is configured as a relay needs it.
type lentTransport struct {
	*quic.Transport
	trace func(context.Context, bool, quic.ConnectionID) qlogwriter.Trace
	tls   *tls.Config // nil: libp2p's
}

func (t lentTransport) Listen(tlsConf *tls.Config, conf *quic.Config) (quicreuse.QUICListener, error) {
	conf = tuned(conf)
	conf.Tracer = t.trace
	if t.tls != nil {
		tlsConf = t.tls
	}
	l, err := t.Transport.Listen(tlsConf, conf)
	if err != nil {
		return nil, err
	}
	return newQueueingListener(l), nil
}

func (t lentTransport) Dial(ctx context.Context, addr net.Addr, tlsConf *tls.Config, conf *quic.Config) (*quic.Conn, error) {
	return t.Transport.Dial(ctx, addr, tlsConf, tuned(conf))
}

// serverTLS returns the configuration of all handshakes with clients. libp2p's own checks
// the client's certificate in the handshake, and again when it accepts the connection.
// This one leaves it to the second time, which is where the client's ID comes from.
// All connections share it, while libp2p makes one for each, and quic-go copies that.
// Together that saves 3 to 6 % of what a newcomer costs (docs/performance.md).
//
// A client that offers another protocol than ours is told so, by the alert
// no_application_protocol (RFC 7301, 3.2). libp2p would refuse it with internal_error,
// which reads like a fault of the relay.
func serverTLS(identity *libp2ptls.Identity) *tls.Config {
	conf, _ := identity.ConfigForPeer("")
	conf.VerifyPeerCertificate = nil
	conf.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.ServerName) > maxServerName {
			return errors.New("server name too long")
		}
		if err := thin(state.PeerCertificates); err != nil {
			return err
		}
		return survives(state.PeerCertificates)
	}
	return conf
}

// thin returns an error if the client's certificates hold much that nobody needs. crypto/tls
// keeps what it has parsed of them as long as the connection lasts: a certificate of 9 KiB
// with 3 000 names took 450 KiB.
func thin(certs []*x509.Certificate) error {
	for _, cert := range certs {
		rest := len(cert.Raw) - len(cert.RawSubjectPublicKeyInfo) - len(cert.Signature)
		for _, e := range cert.Extensions {
			if e.Id.Equal(keyExtension) {
				rest -= len(e.Value)
			}
		}
		if len(cert.Raw) > maxCertificate || rest > maxCertificateRest {
			return errors.New("certificate too long")
		}
	}
	return nil
}

// keyExtension is the extension with the client's key.
// https://github.com/libp2p/specs/blob/master/tls/tls.md#libp2p-public-key-extension
var keyExtension = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 53594, 1, 1}

// survives returns an error if the standard library panics at a client's certificates,
// as it once did (CVE-2024-24783). libp2p recovers from that in the handshake, and not
// where it accepts the connection.
func survives(certs []*x509.Certificate) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = errors.New("bad certificate")
		}
	}()
	for _, cert := range certs {
		roots := x509.NewCertPool()
		roots.AddCert(cert)
		cert.Verify(x509.VerifyOptions{Roots: roots}) // libp2p acts on the result later
	}
	return nil
}

// alpn is the one protocol that is offered inside QUIC's TLS.
// https://github.com/libp2p/specs/blob/master/tls/tls.md#alpn
const alpn = "libp2p"

func tuned(conf *quic.Config) *quic.Config {
	conf = conf.Clone()
	conf.InitialPacketSize = packetSize
	conf.DisablePathMTUDiscovery = true
	conf.InitialStreamReceiveWindow = initialWindow
	conf.InitialConnectionReceiveWindow = initialWindow
	conf.MaxStreamReceiveWindow = maxWindow
	conf.MaxConnectionReceiveWindow = maxWindow * 3 / 2
	conf.MaxIncomingStreams = maxIncomingStreams
	// libp2p uses neither unidirectional streams nor datagrams, only WebTransport
	// does. Nobody would read them here, and each client could fill a queue.
	conf.MaxIncomingUniStreams = -1
	conf.EnableDatagrams = false
	return conf
}

// waitingScope notices when libp2p accepts a connection: libp2p then says whose it
// is.
type waitingScope struct {
	network.ConnManagementScope
	place    *networkPlace
	over     chan struct{} // closed when libp2p has accepted the connection, or it has ended
	once     sync.Once     // closes over
	unproven *atomic.Int64 // counts the connection until it is over; nil: nobody does
}

func (s *waitingScope) SetPeer(id peer.ID) error {
	s.end()
	return s.ConnManagementScope.SetPeer(id)
}

func (s *waitingScope) end() {
	s.once.Do(func() {
		close(s.over)
		if s.unproven != nil {
			s.unproven.Add(-1)
		}
	})
}

// queueingListener keeps connections that come faster than libp2p accepts them. By
// itself libp2p would close the 17th with "queue full".
type queueingListener struct {
	*quic.Listener
	queue  chan *quic.Conn // closed when the listener is
	handed <-chan struct{} // closed when libp2p has accepted the last one
	closed chan struct{}
	close  func()
}

func newQueueingListener(l *quic.Listener) *queueingListener {
	p := &queueingListener{Listener: l, queue: make(chan *quic.Conn, acceptQueue), closed: make(chan struct{})}
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
				case <-p.closed: // the transport ends soon, with all its connections
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

// Accept has one caller, libp2p's loop. It returns the next connection only when
// libp2p has found room for the last.
func (l *queueingListener) Accept(ctx context.Context) (*quic.Conn, error) {
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
		waiting := scope.(*waitingScope)
		l.handed = waiting.over
		waiting.place.belongs(conn)
	}
	return conn, nil
}

func (l *queueingListener) Close() error {
	l.close()
	return l.Listener.Close()
}

// listen binds port on IPv4 and IPv6, and lets h listen there. If the machine lacks
// one of the two it warns; a port that is taken is an error.
func (q *quicSockets) listen(h host.Host, port int, log *slog.Logger) error {
	for _, family := range []struct{ name, network, addr string }{
		{"IPv4", "udp4", "/ip4/0.0.0.0/udp/%d/quic-v1"},
		{"IPv6", "udp6", "/ip6/::/udp/%d/quic-v1"},
	} {
		// If not even a free port can be bound, the machine lacks this family.
		probe, err := net.ListenPacket(family.network, ":0")
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			return fmt.Errorf("bind UDP on %s: %w; raise the limit of open files (ulimit -n, or LimitNOFILE= in the unit)", family.name, err)
		}
		if err != nil {
			log.Warn("no "+family.name+" on this machine, clients can't reach it that way", "err", err)
			continue
		}
		probe.Close()
		if err := q.bind(family.network, port); err != nil {
			return fmt.Errorf("bind UDP port %d on %s: %w", port, family.name, err)
		}
		if err := h.Network().Listen(ma.StringCast(fmt.Sprintf(family.addr, port))); err != nil {
			return fmt.Errorf("listen on UDP port %d on %s: %w", port, family.name, err)
		}
	}
	if len(h.Network().ListenAddresses()) == 0 {
		return errors.New("neither IPv4 nor IPv6 on this machine")
	}
	// Where a sysctl switches IPv6 off, it can still be bound, but no interface
	// has an address.
	addrs, err := h.Network().InterfaceListenAddresses()
	if err != nil {
		return fmt.Errorf("list interface addresses: %w", err)
	}
	if !slices.ContainsFunc(addrs, func(a ma.Multiaddr) bool { return a[0].Protocol().Code == ma.P_IP6 }) {
		log.Warn("no interface has an IPv6 address, clients can't reach it that way")
	}
	return nil
}

// freePort returns a UDP port that is free on both families, which share one number.
func freePort() (int, error) {
	conn, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).Port, nil
}
