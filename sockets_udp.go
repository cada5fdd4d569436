package main

// A UDP socket for three users: quic-go reads from it, a tap sees what arrives, and
// the bridge sends from it. The plain socket in this file reads and sends one
// datagram at a time. Every system but Linux uses it, and so do tests on Linux.

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/quic-go/quic-go"
	xipv4 "golang.org/x/net/ipv4" // its Message is also that of IPv6
	xipv6 "golang.org/x/net/ipv6"
)

// udpSocket extends the UDP socket that quic-go needs with a tap, and a way to send.
type udpSocket interface {
	quic.OOBCapablePacketConn

	// quic-go has these too, without a type of its own.
	ReadBatch(datagrams []xipv4.Message, flags int) (int, error)
	SetWriteBuffer(bytes int) error

	// show sets the tap that sees what arrives. Call it before the first read.
	show(tapped)

	// send sends parts as datagrams of size bytes; the last one of each part may be
	// shorter. They carry these ECN bits, and leave from the address of this machine
	// that from names. The address to must be of the socket's family. Several parts
	// have at most maxSend bytes and maxSegments datagrams together; a single part
	// may have more. send never waits: what the system does not accept is lost, as
	// any packet may be. Several goroutines may call it.
	send(parts [][]byte, size int, ecn byte, to netip.AddrPort, from source)
}

const (
	// maxSend bounds what UDP over IPv6 carries in one message, in bytes, and
	// maxSegments how many datagrams a kernel before 6.10 makes of one message
	// (UDP_MAX_SEGMENTS).
	maxSend     = 1<<16 - 1 - 40 - 8
	maxSegments = 64
)

// tapped sees what has arrived before quic-go does, and takes out what is not for
// quic-go. It must not keep what it is given.
type tapped func([]arrival)

// arrival holds what came from one sender in one message: datagrams of size bytes,
// the last of which may be shorter.
type arrival struct {
	from netip.AddrPort // IPv4 addresses are never mapped into IPv6
	size int
	ecn  byte // the two bits of the IP header (RFC 3168)
	data []byte
}

// source holds a control message that says which address of this machine a datagram is
// sent from. With nil, the system chooses.
type source []byte

// sourceOf returns the control message for addr, or nil if addr is not valid or the
// system has no such message.
func sourceOf(addr netip.Addr) source {
	switch {
	case addr.Is4():
		return (&xipv4.ControlMessage{Src: addr.AsSlice()}).Marshal()
	case addr.Is6():
		return (&xipv6.ControlMessage{Src: addr.AsSlice()}).Marshal()
	}
	return nil
}

// unlessLost returns err, with which the system refused to send a datagram, or nil if
// quic-go is to take the datagram as lost on its way. By itself quic-go ends the
// connection, so that a moment without a route or an address, a firewall that is loaded
// anew, or a full queue would end everybody's. QUIC repeats what was lost, and a
// connection over which nothing comes for long times out. quic-go is told that
//
//   - the socket is closed;
//   - a datagram is too long, which it takes as lost by itself;
//   - the network device cannot split what it was given to be split (EIO, udp(7)):
//     quic-go then sends one by one.
func unlessLost(err error, split bool) error {
	// Windows has another number for EMSGSIZE than package syscall (WSAEMSGSIZE,
	// winsock2.h).
	const tooLong = syscall.Errno(10040)
	if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EMSGSIZE) || errors.Is(err, tooLong) ||
		errors.Is(err, syscall.EIO) && split {
		return err
	}
	return nil
}

// plainSocket reads into quic-go's own buffers. quic-go calls ReadBatch from one
// goroutine, and ReadFrom on Windows.
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

// WriteMsgUDP sends for quic-go, and WriteTo does on Windows.
func (s *plainSocket) WriteMsgUDP(d, control []byte, to *net.UDPAddr) (n, controlN int, err error) {
	n, controlN, err = s.UDPConn.WriteMsgUDP(d, control, to)
	return n, controlN, unlessLost(err, false)
}

func (s *plainSocket) WriteTo(d []byte, to net.Addr) (int, error) {
	n, err := s.UDPConn.WriteTo(d, to)
	return n, unlessLost(err, false)
}

// ReadBatch fills at least one of datagrams with what the socket has for quic-go.
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
			if d != to { // copy, because quic-go expects each place to keep its own buffers
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

// send sends without the ECN bits, because each of these systems sets them in its
// own way. Clients notice that the bits are missing, and do without (RFC 9000,
// 13.4.2).
func (s *plainSocket) send(parts [][]byte, size int, _ byte, to netip.AddrPort, from source) {
	for _, p := range parts {
		for d := range slices.Chunk(p, size) {
			// These systems pass a datagram to the network or refuse it. They have no
			// queue that we could wait for.
			s.WriteMsgUDPAddrPort(d, from, to)
		}
	}
}
