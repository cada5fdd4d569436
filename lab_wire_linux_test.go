package main

// A long wire for the NAT lab: it carries whole Ethernet frames between its two
// ends, later than they came and, if so asked, in another order. Addresses stay as
// they are, so a NAT on one side of it is seen as it is from the other.

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runLabDelay is the wire's process. It has the interfaces near and far; config is
// the round trip that it adds, and the jitter.
func runLabDelay(config string, out io.Writer) error {
	added, more, _ := strings.Cut(config, " ")
	rtt, err := time.ParseDuration(added)
	if err != nil {
		return err
	}
	jitter, err := time.ParseDuration(more)
	if err != nil {
		return err
	}
	near, err := openWireEnd("near")
	if err != nil {
		return err
	}
	far, err := openWireEnd("far")
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "ready")
	ended := make(chan error, 2)
	for _, way := range [][2]int{{near, far}, {far, near}} {
		go func() { ended <- carryFrames(way[0], way[1], rtt/2, jitter) }()
	}
	return <-ended
}

// vnetHeader is the length of the header that Linux puts before each frame, to say
// that it is many datagrams in one and where its checksum is yet to be written.
// Unread by us, it goes out as it came in.
const vnetHeader = 10

// openWireEnd returns a socket that reads and writes the frames of an interface.
func openWireEnd(dev string) (int, error) {
	ifi, err := net.InterfaceByName(dev)
	if err != nil {
		return 0, err
	}
	protocol := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(protocol))
	if err != nil {
		return 0, err
	}
	for _, option := range []struct{ name, value int }{
		{unix.PACKET_VNET_HDR, 1},
		{unix.PACKET_IGNORE_OUTGOING, 1},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, option.name, option.value); err != nil {
			return 0, err
		}
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		return 0, err
	}
	return fd, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: ifi.Index})
}

// carryFrames writes to one end what it reads from the other.
func carryFrames(from, to int, delay, jitter time.Duration) error {
	// A frame that cannot be written is lost, as on any wire.
	write := func(frame []byte) { unix.Write(to, frame) }

	type late struct {
		due   time.Time
		frame []byte
	}
	line := make(chan late, 1<<16)
	go func() { // as long as the process runs
		for l := range line {
			time.Sleep(time.Until(l.due))
			write(l.frame)
		}
	}()
	buf := make([]byte, 1<<17)
	for {
		n, err := unix.Read(from, buf)
		if err == unix.EINTR || err == unix.ENETDOWN {
			continue
		}
		if err != nil {
			return err
		}
		frame := append([]byte(nil), buf[:n]...)
		switch {
		case findsNeighbours(frame[vnetHeader:]):
			write(frame)
		case jitter > 0:
			time.AfterFunc(delay+rand.N(jitter), func() { write(frame) })
		default:
			line <- late{time.Now().Add(delay), frame}
		}
	}
}

// findsNeighbours reports whether a frame asks or tells whose address an IP address
// is, which on a real path happens at each hop and not across it.
func findsNeighbours(frame []byte) bool {
	if len(frame) < 14 {
		return false
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_ARP:
		return true
	case unix.ETH_P_IPV6:
		return len(frame) > 20 && frame[20] == unix.IPPROTO_ICMPV6
	}
	return false
}
