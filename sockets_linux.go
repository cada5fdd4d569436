package main

// Many datagrams at a time. We read with UDP generic receive offload (Linux 5.0 and
// later), and send for a tap with segmentation offload (Linux 4.18 and later); see
// UDP_GRO and UDP_SEGMENT in udp(7). quic-go itself sends this way, but reads one
// datagram per message (quic-go/quic-go#3838).

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	xipv4 "golang.org/x/net/ipv4" // its Message is also that of IPv6
	"golang.org/x/sys/unix"
)

const (
	// groMessages sets how many messages one system call reads. Each message has
	// datagrams of one sender. quic-go reads as many datagrams at a time.
	groMessages = 8

	// groMessage bounds what the kernel puts into one message, in bytes, because
	// UDP's length has 16 bits. Such a message has 64 datagrams at most.
	groMessage = 64 << 10

	// groControl matches the room that quic-go has for what the kernel says of a
	// message, in bytes: the sender's ECN bits, the address reached, and the size of
	// a datagram.
	groControl = 128
)

// groSocket provides the method by which quic-go reads from a socket that it was
// given. Only one goroutine calls it.
type groSocket struct {
	*net.UDPConn
	raw   syscall.RawConn
	batch *xipv4.PacketConn
	tap   tapped // nil: none

	// messages were read last, and arrived is what they hold. Those from index unread
	// on still have datagrams for quic-go; the first of them has only what follows
	// offset.
	messages []xipv4.Message
	arrived  []arrival
	unread   int
	offset   int

	// segments says that the kernel splits what we give it to send. Some network
	// devices cannot split.
	segments atomic.Bool
	senders  sync.Pool // of *sender
}

// newUDPSocket wraps conn with both offloads, or with those that the kernel has.
// Closing the socket closes conn.
func newUDPSocket(conn *net.UDPConn) udpSocket {
	raw, err := conn.SyscallConn()
	if err != nil {
		return newPlainSocket(conn) // conn is closed
	}
	s := &groSocket{UDPConn: conn, raw: raw, batch: xipv4.NewPacketConn(conn), messages: make([]xipv4.Message, groMessages)}
	raw.Control(func(fd uintptr) {
		// Without UDP_GRO, each message is one datagram.
		unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1)
		_, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		s.segments.Store(err == nil)
	})
	for i := range s.messages {
		s.messages[i].Buffers = [][]byte{make([]byte, groMessage)}
		s.messages[i].OOB = make([]byte, groControl)
	}
	s.arrived = make([]arrival, 0, groMessages)
	s.senders.New = func() any { return newSender() }
	return s
}

func (s *groSocket) show(tap tapped) { s.tap = tap }

// WriteMsgUDP sends for quic-go.
func (s *groSocket) WriteMsgUDP(d, control []byte, to *net.UDPAddr) (n, controlN int, err error) {
	n, controlN, err = s.UDPConn.WriteMsgUDPAddrPort(d, control, addrPort(to)) // allocates nothing
	if err != nil {
		err = unlessLost(err, splits(control))
	}
	return n, controlN, err
}

// splits reports whether control asks the kernel to split what it sends.
func splits(control []byte) bool {
	for len(control) > 0 {
		header, _, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			return false
		}
		if header.Level == unix.IPPROTO_UDP && header.Type == unix.UDP_SEGMENT {
			return true
		}
		control = rest
	}
	return false
}

// ReadBatch fills at least one of datagrams with what the socket has for quic-go.
func (s *groSocket) ReadBatch(datagrams []xipv4.Message, flags int) (n int, err error) {
	for n == 0 {
		if s.unread == len(s.arrived) {
			if err := s.read(flags); err != nil {
				return 0, err
			}
			if len(s.arrived) == 0 {
				return 0, nil
			}
		}
		for n < len(datagrams) && s.unread < len(s.arrived) {
			a, m := &s.arrived[s.unread], &s.messages[s.unread]
			if s.offset < len(a.data) || m.N == 0 {
				d, next := &datagrams[n], min(s.offset+a.size, len(a.data))
				d.N = copy(d.Buffers[0], a.data[s.offset:next])
				d.NN = copy(d.OOB, m.OOB[:m.NN])
				d.Addr, d.Flags = m.Addr, m.Flags
				n++
				s.offset = next
			}
			if s.offset >= len(a.data) {
				s.unread, s.offset = s.unread+1, 0
			}
		}
	}
	return n, nil
}

// read reads messages and shows them to the tap.
func (s *groSocket) read(flags int) error {
	n, err := s.batch.ReadBatch(s.messages, flags)
	if err != nil {
		return err
	}
	s.arrived, s.unread, s.offset = s.arrived[:0], 0, 0
	for i := range n {
		m := &s.messages[i]
		a := arrival{from: addrPort(m.Addr), data: m.Buffers[0][:m.N]}
		a.size, a.ecn = readControl(m.OOB[:m.NN])
		if a.size == 0 {
			a.size = max(m.N, 1) // one datagram
		}
		s.arrived = append(s.arrived, a)
	}
	if s.tap != nil {
		s.tap(s.arrived)
	}
	return nil
}

// readControl returns the size of a message's datagrams, in bytes, and their ECN
// bits. Size 0 means that the message is one datagram.
func readControl(control []byte) (size int, ecn byte) {
	for len(control) > 0 {
		header, value, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			break
		}
		switch {
		case header.Level == unix.IPPROTO_UDP && header.Type == unix.UDP_GRO && len(value) >= 4:
			size = max(1, int(binary.NativeEndian.Uint32(value)))
		case header.Level == unix.IPPROTO_IP && header.Type == unix.IP_TOS && len(value) >= 1:
			ecn = value[0] & 3
		case header.Level == unix.IPPROTO_IPV6 && header.Type == unix.IPV6_TCLASS && len(value) >= 4:
			ecn = byte(binary.NativeEndian.Uint32(value) & 3)
		}
		control = rest
	}
	return size, ecn
}

func (s *groSocket) send(parts [][]byte, size int, ecn byte, to netip.AddrPort, from source) {
	out := s.senders.Get().(*sender)
	defer s.senders.Put(out)
	out.address(to)
	if (len(parts) > 1 || len(parts[0]) > size) && s.segments.Load() {
		err := out.send(s.raw, parts, from, ecn, size)
		switch {
		case errors.Is(err, unix.EIO):
			// The network device cannot split (udp(7)), and most likely never will.
			s.segments.Store(false)
		case !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EMSGSIZE):
			return
		}
		// Something is too long for the path, or for one message. Shorter datagrams
		// may still go.
	}
	for _, p := range parts {
		for d := range slices.Chunk(p, size) {
			out.one[0] = d
			out.send(s.raw, out.one[:], from, ecn, 0)
		}
	}
}

// sender holds what one sendmsg(2) needs. We reuse it, so that sending allocates
// nothing.
type sender struct {
	to4 unix.SockaddrInet4
	to6 unix.SockaddrInet6
	to  unix.Sockaddr

	one     [1][]byte
	parts   [][]byte
	control []byte
	err     error
	sendmsg func(fd uintptr)
}

func newSender() *sender {
	s := &sender{control: make([]byte, 0, 192)}
	s.sendmsg = func(fd uintptr) {
		if len(s.parts) == 1 {
			_, s.err = unix.SendmsgN(int(fd), s.parts[0], s.control, s.to, unix.MSG_DONTWAIT)
		} else {
			_, s.err = unix.SendmsgBuffers(int(fd), s.parts, s.control, s.to, unix.MSG_DONTWAIT)
		}
	}
	return s
}

func (s *sender) address(to netip.AddrPort) {
	if to.Addr().Is4() {
		s.to4 = unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		s.to = &s.to4
	} else {
		s.to6 = unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		s.to = &s.to6
	}
}

// send sends parts, split into datagrams of segment bytes unless segment is 0.
func (s *sender) send(raw syscall.RawConn, parts [][]byte, from source, ecn byte, segment int) error {
	s.parts, s.control = parts, append(s.control[:0], from...)
	if ecn != 0 {
		level, typ := unix.IPPROTO_IP, unix.IP_TOS
		if s.to == unix.Sockaddr(&s.to6) {
			level, typ = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
		}
		var value []byte
		s.control, value = appendControl(s.control, level, typ, 4)
		binary.NativeEndian.PutUint32(value, uint32(ecn))
	}
	if segment != 0 {
		var value []byte
		s.control, value = appendControl(s.control, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(value, uint16(segment))
	}
	// Use Control, because Write waits for other writers, and one of those may be
	// waiting for room in the socket.
	if err := raw.Control(s.sendmsg); err != nil {
		return err
	}
	return s.err
}

// appendControl appends a control message (cmsg(3)), and returns its value of size
// bytes for the caller to fill. The header differs between 32 and 64 bits.
func appendControl(b []byte, level, typ, size int) (control, value []byte) {
	start := len(b)
	b = append(b, make([]byte, unix.CmsgSpace(size))...)
	header := (*unix.Cmsghdr)(unsafe.Pointer(&b[start]))
	header.Level, header.Type = int32(level), int32(typ)
	header.SetLen(unix.CmsgLen(size))
	return b, b[start+unix.CmsgLen(0):][:size]
}
