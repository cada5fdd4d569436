package main

// Reading many datagrams of one sender at a time: UDP generic receive offload, Linux
// 5.0 and later (udp(7), UDP_GRO). quic-go sends many at a time by itself, but reads
// one datagram per message (quic-go/quic-go#3838).

import (
	"encoding/binary"
	"net"

	"github.com/quic-go/quic-go"
	xipv4 "golang.org/x/net/ipv4" // its Message is that of IPv6 too
	"golang.org/x/sys/unix"
)

const (
	// groMessages is how many messages one system call reads, each of datagrams of
	// one sender. quic-go takes as many datagrams at a time.
	groMessages = 8

	// groMessage is the most bytes that the kernel puts into one message, 64
	// datagrams at most: UDP's length has 16 bits.
	groMessage = 64 << 10

	// groControl is how many bytes quic-go reserves for what the kernel says about a
	// message: the sender's ECN bits, the address reached, the size of a datagram.
	groControl = 128
)

// groConn has the method by which quic-go reads from a socket that it is given.
// It has one caller.
type groConn struct {
	*net.UDPConn
	batch *xipv4.PacketConn

	// messages are the buffers to read into. Those in unread still have datagrams
	// for quic-go: the first one from offset on, each size bytes long but the last.
	messages     []xipv4.Message
	unread       []xipv4.Message
	offset, size int
}

// coalescing wraps conn with receive offload, or returns it as it is where the
// kernel has none. Closing the result closes conn.
func coalescing(conn *net.UDPConn) quic.OOBCapablePacketConn {
	raw, err := conn.SyscallConn()
	if err != nil {
		return conn
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	})
	if err != nil || optErr != nil {
		return conn
	}
	c := &groConn{UDPConn: conn, batch: xipv4.NewPacketConn(conn), messages: make([]xipv4.Message, groMessages)}
	for i := range c.messages {
		c.messages[i].Buffers = [][]byte{make([]byte, groMessage)}
		c.messages[i].OOB = make([]byte, groControl)
	}
	return c
}

// ReadBatch fills datagrams, at least one, with what the socket has.
func (c *groConn) ReadBatch(datagrams []xipv4.Message, flags int) (n int, err error) {
	if len(c.unread) == 0 {
		n, err := c.batch.ReadBatch(c.messages, flags)
		if err != nil || n == 0 {
			return 0, err
		}
		c.unread = c.messages[:n]
		c.size = datagramSize(c.unread[0])
	}
	for n < len(datagrams) && len(c.unread) > 0 {
		m, d := &c.unread[0], &datagrams[n]
		next := min(c.offset+c.size, m.N)
		d.N = copy(d.Buffers[0], m.Buffers[0][c.offset:next])
		d.NN = copy(d.OOB, m.OOB[:m.NN])
		d.Addr, d.Flags = m.Addr, m.Flags
		n++
		if c.offset = next; next == m.N {
			c.unread, c.offset = c.unread[1:], 0
			if len(c.unread) > 0 {
				c.size = datagramSize(c.unread[0])
			}
		}
	}
	return n, nil
}

// datagramSize returns how long each datagram in m is, in bytes.
func datagramSize(m xipv4.Message) int {
	for control := m.OOB[:m.NN]; len(control) > 0; {
		header, value, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			break
		}
		if header.Level == unix.IPPROTO_UDP && header.Type == unix.UDP_GRO && len(value) >= 4 {
			return max(1, int(binary.NativeEndian.Uint32(value)))
		}
		control = rest
	}
	return m.N // one
}
