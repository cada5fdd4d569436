package main

// One UDP socket, as quic-go reads from it, a tap sees what arrives, and the bridge sends
// from it; and the plain one of the systems that read and send one datagram at a time,
// which is all but Linux. Tests use it on Linux, too.

import (
	"net"
	"net/netip"
	"slices"

	"github.com/quic-go/quic-go"
	xipv4 "golang.org/x/net/ipv4" // its Message is that of IPv6 too
	xipv6 "golang.org/x/net/ipv6"
)

// udpSocket is a UDP socket as quic-go uses it, from which a tap can send.
type udpSocket interface {
	quic.OOBCapablePacketConn

	// quic-go has these too, without a type of its own.
	ReadBatch(datagrams []xipv4.Message, flags int) (int, error)
	SetWriteBuffer(bytes int) error

	// show sets the tap that sees what arrives. It is called before the first read.
	show(tapped)

	// send sends datagrams of size bytes, the last one of each part perhaps shorter,
	// with these ECN bits, from the address of this machine that from names. The
	// address to is of the socket's family. Together the parts have at most maxSend
	// bytes and maxSegments datagrams, unless there is only one part. send never
	// waits: what the system does not accept is lost, as any packet may be. Several
	// goroutines may call it.
	send(parts [][]byte, size int, ecn byte, to netip.AddrPort, from source)
}

const (
	// maxSend is the most that UDP over IPv6 carries in one message, in bytes, and
	// maxSegments how many datagrams a kernel before 6.10 makes of it
	// (UDP_MAX_SEGMENTS).
	maxSend     = 1<<16 - 1 - 40 - 8
	maxSegments = 64
)

// tapped is a function that sees what has arrived before quic-go does, and takes out
// what is not for quic-go. It must not keep what it is given.
type tapped func([]arrival)

// arrival is what came from one sender in one message: datagrams of size bytes, the
// last one perhaps shorter.
type arrival struct {
	from netip.AddrPort // an IPv4 address is never mapped into IPv6
	size int
	ecn  byte // the two bits of the IP header (RFC 3168)
	data []byte
}

// source is a control message that says from which address of this machine a datagram
// is sent. With nil the system chooses.
type source []byte

// sourceOf returns the control message for addr, or nil if addr is not valid or the
// system knows no such message.
func sourceOf(addr netip.Addr) source {
	switch {
	case addr.Is4():
		return (&xipv4.ControlMessage{Src: addr.AsSlice()}).Marshal()
	case addr.Is6():
		return (&xipv6.ControlMessage{Src: addr.AsSlice()}).Marshal()
	}
	return nil
}

// addrPort returns addr in the form of arrival.from. It is not valid if addr is not a
// UDP address.
func addrPort(addr net.Addr) netip.AddrPort {
	u, ok := addr.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := u.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// plainSocket reads into quic-go's own buffers. quic-go calls ReadBatch, and on
// Windows ReadFrom, from one goroutine.
type plainSocket struct {
	*net.UDPConn
	batch *xipv4.PacketConn
	tap   tapped // nil: none

	arrived [1]arrival
}

func newPlainSocket(conn *net.UDPConn) udpSocket {
	return &plainSocket{UDPConn: conn, batch: xipv4.NewPacketConn(conn)}
}

func (s *plainSocket) show(tap tapped) { s.tap = tap }

// ReadBatch fills datagrams, at least one, with what the socket has for quic-go.
func (s *plainSocket) ReadBatch(datagrams []xipv4.Message, flags int) (int, error) {
	for {
		n, err := s.batch.ReadBatch(datagrams, flags)
		if err != nil || s.tap == nil {
			return n, err
		}
		kept := 0
		for i := range n {
			d, to := &datagrams[i], &datagrams[kept]
			if !s.keeps(d.Addr, d.Buffers[0][:d.N]) {
				continue
			}
			if d != to { // each place keeps its buffers, which quic-go knows by it
				to.N, to.NN = copy(to.Buffers[0], d.Buffers[0][:d.N]), copy(to.OOB, d.OOB[:d.NN])
				to.Addr, to.Flags = d.Addr, d.Flags
			}
			kept++
		}
		if kept > 0 {
			return kept, nil
		}
	}
}

// ReadFrom reads one datagram for quic-go.
func (s *plainSocket) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		n, from, err := s.UDPConn.ReadFrom(p)
		if err != nil || s.keeps(from, p[:n]) {
			return n, from, err
		}
	}
}

// keeps reports whether d is for quic-go.
func (s *plainSocket) keeps(from net.Addr, d []byte) bool {
	if s.tap == nil || len(d) == 0 {
		return true
	}
	s.arrived[0] = arrival{from: addrPort(from), size: len(d), data: d}
	s.tap(s.arrived[:])
	return len(s.arrived[0].data) > 0
}

// send leaves the ECN bits away, which these systems mark each in its own way:
// clients notice, and do without (RFC 9000, 13.4.2).
func (s *plainSocket) send(parts [][]byte, size int, _ byte, to netip.AddrPort, from source) {
	for _, p := range parts {
		for d := range slices.Chunk(p, size) {
			// These systems hand a datagram to the network or refuse it, and have no
			// queue that could be waited for.
			s.WriteMsgUDPAddrPort(d, from, to)
		}
	}
}
