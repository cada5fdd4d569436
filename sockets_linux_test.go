package main

// Tests of reading many datagrams of one sender at a time.

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
	"unsafe"

	xipv4 "golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// Datagrams that the kernel has coalesced arrive as they were sent: one by one, with
// their sender and their ECN bits.
func TestCoalescedDatagramsArriveAsTheyWereSent(t *testing.T) {
	for _, local := range []*net.UDPAddr{{IP: net.IPv4(127, 0, 0, 1)}, {IP: net.IPv6loopback}} {
		t.Run(local.IP.String(), func(t *testing.T) {
			in, out := listenUDP(t, local), listenUDP(t, local)
			conn := newUDPSocket(in).(*groSocket)
			const ect0 = 2 // RFC 3168
			if local.IP.To4() != nil {
				setOption(t, in, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
				setOption(t, out, unix.IPPROTO_IP, unix.IP_TOS, ect0)
			} else {
				setOption(t, in, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
				setOption(t, out, unix.IPPROTO_IPV6, unix.IPV6_TCLASS, ect0)
			}
			// One datagram; 40 of one size and a shorter one; one too long for
			// quic-go's buffer; an empty one; a short one.
			var want [][]byte
			send := func(datagrams ...[]byte) {
				t.Helper()
				want = append(want, datagrams...)
				if _, _, err := out.WriteMsgUDP(bytes.Join(datagrams, nil), nil, in.LocalAddr().(*net.UDPAddr)); err != nil {
					t.Fatal(err)
				}
			}
			pattern := func(n int) []byte { return bytes.Repeat([]byte{byte(len(want) + 1)}, n) }
			send(pattern(1200))
			var burst [][]byte
			for i := range 40 {
				burst = append(burst, bytes.Repeat([]byte{byte(100 + i)}, 1252))
			}
			setOption(t, out, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1252)
			send(append(burst, []byte("the last one"))...)
			setOption(t, out, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 0)
			send(pattern(2000))
			send(nil)
			send(pattern(7))

			datagrams := make([]xipv4.Message, 8)
			for i := range datagrams {
				datagrams[i].Buffers = [][]byte{make([]byte, 1452)}
				datagrams[i].OOB = make([]byte, groControl)
			}
			coalesced := false
			for len(want) > 0 {
				n, err := conn.ReadBatch(datagrams, 0)
				if err != nil || n == 0 {
					t.Fatalf("ReadBatch = %d, %v", n, err)
				}
				for _, m := range conn.messages {
					coalesced = coalesced || m.N > 2*1252
				}
				for _, d := range datagrams[:n] {
					if len(want) == 0 {
						t.Fatalf("%d bytes arrived that were not sent", d.N)
					}
					if got, want := d.Buffers[0][:d.N], want[0][:min(len(want[0]), 1452)]; !bytes.Equal(got, want) {
						t.Fatalf("got %d bytes, %.8q…, want %d, %.8q…", len(got), got, len(want), want)
					}
					if d.Addr.String() != out.LocalAddr().String() {
						t.Errorf("datagram came from %v, want %v", d.Addr, out.LocalAddr())
					}
					if got := ecn(d.OOB[:d.NN]); got != ect0 {
						t.Errorf("ECN bits %d, want %d", got, ect0)
					}
					want = want[1:]
				}
			}
			if !coalesced {
				t.Error("each datagram arrived by itself, so nothing was tested")
			}
		})
	}
}

func listenUDP(t *testing.T, local *net.UDPAddr) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp", local)
	if err != nil {
		t.Skip(err) // no IPv6 here
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// setOption sets an integer option of conn's socket.
func setOption(t *testing.T, conn *net.UDPConn, level, option, value int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var optErr error
	err = raw.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), level, option, value) })
	if err != nil || optErr != nil {
		t.Fatal(err, optErr)
	}
}

// ecn returns the ECN bits in a control message, or -1 if it has none.
func ecn(control []byte) int {
	for len(control) > 0 {
		header, value, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			break
		}
		if header.Level == unix.IPPROTO_IP && header.Type == unix.IP_TOS ||
			header.Level == unix.IPPROTO_IPV6 && header.Type == unix.IPV6_TCLASS {
			return int(value[0] & 3)
		}
		control = rest
	}
	return -1
}

// What a tap sends arrives unchanged, from the address and with the ECN bits that
// the tap asked for, in as few calls as the kernel allows. Where the kernel cannot
// split, or something is too long, the rest still arrives.
func TestSocketSendsAsItIsTold(t *testing.T) {
	for _, tt := range []struct {
		name     string
		family   string
		from, to string
		segments bool
	}{
		{"IPv4", "udp4", "127.0.0.7", "127.0.0.1", true},
		{"IPv6", "udp6", "::1", "::1", true},
		{"no segmentation", "udp4", "127.0.0.7", "127.0.0.1", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := net.ListenUDP(tt.family, nil)
			if err != nil {
				t.Skip(err) // no IPv6 here
			}
			defer out.Close()
			in := listenUDP(t, &net.UDPAddr{IP: net.ParseIP(tt.to)})
			s := newUDPSocket(out).(*groSocket)
			if !tt.segments {
				s.segments.Store(false)
			}
			setOption(t, in, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
			if tt.family == "udp6" {
				setOption(t, in, unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, 1)
			}
			setOption(t, out, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE) // as quic-go does
			to := addrPort(in.LocalAddr())
			part := func(fill byte, n int) []byte { return bytes.Repeat([]byte{fill}, n) }
			const ce = 3
			var want [][]byte
			send := func(size int, lost bool, parts ...[]byte) {
				s.send(parts, size, ce, to, sourceOf(netip.MustParseAddr(tt.from)))
				for _, p := range parts {
					for d := range slices.Chunk(p, size) {
						if !lost {
							want = append(want, d)
						}
					}
				}
			}
			send(1200, false, part(1, 1200))
			send(1200, false, part(2, 700))
			send(1252, false, part(3, 3*1252), part(4, 2*1252), part(5, 1252+7))
			send(40, false, part(6, 40*64))
			send(1<<16, true, part(7, 1<<16)) // longer than UDP allows
			send(33, false, part(8, 3*33))
			control, p := make([]byte, 128), make([]byte, 1<<16)
			in.SetReadDeadline(time.Now().Add(testTimeout))
			for i, w := range want {
				n, nn, _, from, err := in.ReadMsgUDPAddrPort(p, control)
				if err != nil {
					t.Fatalf("%d of %d datagrams arrived: %v", i, len(want), err)
				}
				if !bytes.Equal(p[:n], w) || from.Addr().Unmap() != netip.MustParseAddr(tt.from) || ecn(control[:nn]) != ce {
					t.Fatalf("datagram %d: %d bytes %.4x from %v, ECN %d, want %d bytes %.4x from %v, ECN %d",
						i, n, p[:n], from, ecn(control[:nn]), len(w), w, tt.from, ce)
				}
			}
			if s.segments.Load() != tt.segments {
				t.Error("a datagram that was too long switched segmentation off")
			}
		})
	}
}

// The goroutine that calls the tap reads for everybody. So sending must not wait for
// room, or for another writer that does.
func TestSocketNeverWaits(t *testing.T) {
	out, in := listenUDP(t, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}), listenUDP(t, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	s := newUDPSocket(out)
	raw, err := out.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Act as a writer that waits for room and holds the socket's write lock.
	waits, let := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- raw.Write(func(uintptr) bool {
			close(waits)
			<-let
			return true
		})
	}()
	<-waits
	s.send([][]byte{[]byte("hello")}, 5, 0, addrPort(in.LocalAddr()), nil)
	in.SetReadDeadline(time.Now().Add(testTimeout))
	if n, err := in.Read(make([]byte, 10)); n != 5 || err != nil {
		t.Errorf("read = %d, %v", n, err)
	}
	close(let)
	if err := <-done; err != nil {
		t.Error(err)
	}
	out.Close()
	s.send([][]byte{[]byte("hello")}, 5, 0, addrPort(in.LocalAddr()), nil) // does no harm after Close
}

// A network device that cannot split is no reason to lose anything: quic-go is told, and
// sends one by one.
func TestDeviceThatCannotSplitIsTold(t *testing.T) {
	control := sourceOf(netip.MustParseAddr("192.0.2.1"))
	if splits(control) {
		t.Error("a source address is taken for segmentation")
	}
	control, _ = appendControl(control, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)
	if !splits(control) {
		t.Error("segmentation is not seen")
	}
	if err := unlessLost(unix.EIO, true); err != unix.EIO {
		t.Errorf("quic-go is told %v, want %v", err, unix.EIO)
	}
}

// The tables and buffers of a socket are in the memory that the start log promises.
func TestSocketMemory(t *testing.T) {
	if size := unsafe.Sizeof(gate{}); size > gateMemory+64 || size < gateMemory {
		t.Errorf("the gate has %d bytes, but gateMemory is %d", size, gateMemory)
	}
	sum := unsafe.Sizeof(pathGuard{}) + groMessages*groMessage + newcomers*unsafe.Sizeof(newcomer{})
	if sum > socketMemory || sum < socketMemory-16<<10 {
		t.Errorf("a socket has %d bytes, but socketMemory is %d", sum, socketMemory)
	}
}
