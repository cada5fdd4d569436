package main

// The socket of the systems that read and send one datagram at a time: all but
// Linux. Tests use it there, too.

import (
	"net"
	"net/netip"
	"slices"

	xipv4 "golang.org/x/net/ipv4" // its Message is that of IPv6 too
)

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
