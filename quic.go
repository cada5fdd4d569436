package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"
)

const (
	// packetSize is what every path must carry in one UDP datagram (RFC 9000,
	// 14.1), in bytes. By default quic-go begins with 1280 and never goes below,
	// so that no handshake ends on a path with an MTU of 1280, as some tunnels
	// and mobile networks have. Where the path carries more, discovery finds out.
	packetSize = 1200

	// handshakeRate is how many connections may begin per second before
	// newcomers have to prove their address by a Retry first (RFC 9000, 8.1.2).
	// It is what libp2p has.
	handshakeRate = 1000
)

// quicSockets are the UDP sockets on which libp2p listens. It can bind its own,
// but takes the QUIC configuration from nobody: these it borrows. Give
// newManager to libp2p.QUICReuse, bind before listening, and close at the end.
type quicSockets struct {
	manager *quicreuse.ConnManager
	reset   quic.StatelessResetKey
	token   quic.TokenGeneratorKey

	admit  func(context.Context, *quic.ClientInfo) (context.Context, error)
	verify func(net.Addr) bool
	bound  []*quic.Transport
}

// newManager is called by libp2p, with keys that it derives from the identity.
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
			return ctx, err
		}
		context.AfterFunc(ctx, scope.Done)
		return network.WithConnManagementScope(ctx, scope), nil
	}
	handshakes := rate.NewLimiter(handshakeRate, handshakeRate)
	q.verify = func(addr net.Addr) bool {
		return !handshakes.Allow() || resources.VerifySourceAddress(addr)
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
	tr := &quic.Transport{
		Conn:                conn,
		StatelessResetKey:   &q.reset,
		TokenGeneratorKey:   &q.token,
		ConnContext:         q.admit,
		VerifySourceAddress: q.verify,
	}
	q.bound = append(q.bound, tr)
	_, err = q.manager.LendTransport(family, lentTransport{tr}, conn)
	return err
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
	return t.Transport.Listen(tlsConf, tuned(conf))
}

func (t lentTransport) Dial(ctx context.Context, addr net.Addr, tlsConf *tls.Config, conf *quic.Config) (*quic.Conn, error) {
	return t.Transport.Dial(ctx, addr, tlsConf, tuned(conf))
}

func tuned(conf *quic.Config) *quic.Config {
	conf = conf.Clone()
	conf.InitialPacketSize = packetSize
	// libp2p speaks neither over QUIC by itself, only WebTransport does. Nobody
	// would read them here, and each client could fill a queue.
	conf.MaxIncomingUniStreams = -1
	conf.EnableDatagrams = false
	return conf
}
