//go:build linux

package main

// More of what an attacker cannot take: memory by means that no library counts, and CPU.
// The attackers here write QUIC packets of their own, as no library would; see rawConn.
//
// As in lab_attacks_test.go, an honest group is there meanwhile, the relay has the memory
// that its log promises, and ATTACKS=full is for the whole size.

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	quicgo "github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"
	"google.golang.org/protobuf/encoding/protodelim"
)

// rawConn is a connection to the relay that quic-go has begun, and that writes packets of
// its own from then on: any frames, in any order. It acknowledges nothing.
type rawConn struct {
	socket *mutedSocket
	relay  net.Addr
	id     []byte // the relay's connection ID
	number uint32 // of the last packet
	keys   packetKeys
}

// packetKeys protect the packets of one direction (RFC 9001, 5), with AES-128-GCM.
type packetKeys struct {
	aead   cipher.AEAD
	iv     []byte
	header cipher.Block
}

// expandLabel is HKDF-Expand-Label of TLS 1.3 (RFC 8446, 7.1).
func expandLabel(secret []byte, label string, length int) []byte {
	info := binary.BigEndian.AppendUint16(nil, uint16(length))
	info = append(info, byte(len("tls13 "+label)))
	info = append(info, "tls13 "+label+"\x00"...)
	key, _ := hkdf.Expand(sha256.New, secret, string(info), length)
	return key
}

func newPacketKeys(secret []byte) (k packetKeys, err error) {
	block, err := aes.NewCipher(expandLabel(secret, "quic key", 16))
	if err != nil {
		return k, err
	}
	if k.aead, err = cipher.NewGCM(block); err != nil {
		return k, err
	}
	k.iv = expandLabel(secret, "quic iv", 12)
	k.header, err = aes.NewCipher(expandLabel(secret, "quic hp", 16))
	return k, err
}

// seal returns a packet that begins with header, which lacks only the packet number. That
// has four bytes.
func (k packetKeys) seal(header []byte, number uint32, frames []byte) []byte {
	p, at := slices.Clone(header), len(header)
	p = binary.BigEndian.AppendUint32(p, number)
	nonce := slices.Clone(k.iv)
	for i, b := range binary.BigEndian.AppendUint64(nil, uint64(number)) {
		nonce[4+i] ^= b
	}
	p = k.aead.Seal(p, nonce, frames, p)
	var mask [16]byte
	k.header.Encrypt(mask[:], p[at+4:at+20])
	if p[0]&0x80 != 0 {
		p[0] ^= mask[0] & 0x0f
	} else {
		p[0] ^= mask[0] & 0x1f
	}
	for i := range 4 {
		p[at+i] ^= mask[1+i]
	}
	return p
}

// initialPacket returns an Initial packet of 1200 bytes and more, as whoever knows the
// connection ID and the token of a Retry, if there was one, can make it (RFC 9001, 5.2,
// and RFC 9000, 17.2.2).
func initialPacket(id, token []byte, number uint32, frames []byte) ([]byte, error) {
	salt, _ := hex.DecodeString("38762cf7f55934b34d179ae6a4c80cadccbb7f0a")
	initial, err := hkdf.Extract(sha256.New, id, salt)
	if err != nil {
		return nil, err
	}
	keys, err := newPacketKeys(expandLabel(initial, "client in", sha256.Size))
	if err != nil {
		return nil, err
	}
	frames = append(slices.Clone(frames), make([]byte, max(0, 1200-len(frames)))...) // PADDING
	header := append([]byte{0xc3, 0, 0, 0, 1, byte(len(id))}, id...)
	header = append(header, 8)
	header = append(header, id[:8]...) // the client's own
	header = append(quicvarint.Append(header, uint64(len(token))), token...)
	header = quicvarint.AppendWithLen(header, uint64(4+len(frames)+keys.aead.Overhead()), 2)
	return keys.seal(header, number, frames), nil
}

// mutedSocket is a client's socket, until it is muted. It has only the methods of a
// net.PacketConn, so that quic-go writes by WriteTo.
type mutedSocket struct {
	net.PacketConn
	muted atomic.Bool
	delay time.Duration // of what it writes; 0: none
	loses atomic.Int64  // one of so many, each way, and mixes up what it writes; 0: none
	reads int64
	wrote atomic.Int64
	keys  bytes.Buffer // what crypto/tls logs of the handshake, if it does
	seen  chan []byte  // gets what it reads while it is muted; nil: nobody does

	mu  sync.Mutex
	id  []byte // of the last packet with a short header
	len int    // of the relay's connection IDs
}

func (s *mutedSocket) WriteTo(p []byte, to net.Addr) (int, error) {
	if s.muted.Load() {
		return len(p), nil
	}
	s.mu.Lock()
	if id, ok := handshakeID(p); ok {
		s.len = len(id) // of the last one, which the relay has chosen
	} else if len(p) > 1+s.len {
		s.id = bytes.Clone(p[1 : 1+s.len])
	}
	s.mu.Unlock()
	delay := s.delay
	if every := s.loses.Load(); every > 0 {
		n := s.wrote.Add(1)
		if n%every == 0 {
			return len(p), nil
		}
		delay += delay * time.Duration(n%7) / 7
	}
	if delay > 0 {
		p = bytes.Clone(p)
		time.AfterFunc(delay, func() {
			if !s.muted.Load() {
				s.PacketConn.WriteTo(p, to)
			}
		})
		return len(p), nil
	}
	return s.PacketConn.WriteTo(p, to)
}

func (*mutedSocket) SetReadBuffer(int) error  { return nil } // or quic-go complains
func (*mutedSocket) SetWriteBuffer(int) error { return nil }

func (s *mutedSocket) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		n, from, err := s.PacketConn.ReadFrom(p)
		s.reads++
		if err == nil && s.muted.Load() && s.seen != nil {
			select {
			case s.seen <- bytes.Clone(p[:n]):
			default:
			}
		}
		lost := s.loses.Load() > 0 && s.reads%s.loses.Load() == 0
		if err != nil || !s.muted.Load() && !lost {
			return n, from, err
		}
	}
}

// dialRawLocally is dialRaw from a new port of 127.0.0.1.
func dialRawLocally(ctx context.Context, t *testing.T, relay peer.AddrInfo) (*rawConn, error) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	return dialRaw(ctx, t, conn, relay)
}

// dialRaw connects to the relay from an address, asks for a node so that all keys are in
// use, and takes over.
func dialRaw(ctx context.Context, t *testing.T, from *net.UDPConn, relay peer.AddrInfo) (*rawConn, error) {
	who, err := makeLightIdentity()
	if err != nil {
		return nil, err
	}
	to, err := manet.ToNetAddr(relay.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return nil, err
	}
	socket := &mutedSocket{PacketConn: from}
	tr := &quicgo.Transport{Conn: socket}
	t.Cleanup(func() {
		socket.Close()
		tr.Close()
	})
	var keys bytes.Buffer
	tlsConf, _ := who.tls.ConfigForPeer(relay.ID)
	tlsConf.KeyLogWriter = &keys
	tlsConf.CurvePreferences = []tls.CurveID{tls.X25519}
	conn, err := tr.Dial(ctx, to, tlsConf, lightConfig())
	if err != nil {
		return nil, err
	}
	client := who.over(conn)
	go client.serve()
	if _, err := client.ask(ctx, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(who.id), 0)); err != nil {
		return nil, err
	}
	socket.muted.Store(true)
	socket.mu.Lock()
	defer socket.mu.Unlock()
	if suite := conn.ConnectionState().TLS.CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		return nil, fmt.Errorf("the handshake chose %s", tls.CipherSuiteName(suite))
	}
	raw := &rawConn{socket: socket, relay: to, id: socket.id, number: 1000}
	return raw, raw.derive(keys.String())
}

// derive takes the keys of 1-RTT packets from what crypto/tls logs of a handshake with
// TLS_AES_128_GCM_SHA256 (RFC 9001, 5.1).
func (c *rawConn) derive(logged string) error {
	secret, err := loggedSecret(logged, "CLIENT_TRAFFIC_SECRET_0")
	if err != nil {
		return err
	}
	c.keys, err = newPacketKeys(secret)
	return err
}

// loggedSecret returns a secret of the name from what crypto/tls logs.
func loggedSecret(logged, name string) ([]byte, error) {
	_, rest, found := strings.Cut(logged, name+" ")
	if !found {
		return nil, errors.New("no secret was logged")
	}
	line, _, _ := strings.Cut(rest, "\n")
	_, encoded, _ := strings.Cut(line, " ")
	secret, err := hex.DecodeString(encoded)
	if err != nil || len(secret) != sha256.Size {
		return nil, fmt.Errorf("a secret of %d bytes, %v", len(secret), err)
	}
	return secret, nil
}

// send sends frames in one packet (RFC 9000, 17.3.1).
func (c *rawConn) send(frames []byte) error {
	c.number++
	p := c.keys.seal(append([]byte{0x43}, c.id...), c.number, frames)
	_, err := c.socket.PacketConn.WriteTo(p, c.relay)
	return err
}

// sendAll sends frames in as few packets as they fit into, and not so fast that most are
// lost.
func (c *rawConn) sendAll(ctx context.Context, frames func(yield func([]byte) bool)) error {
	var packet []byte
	sent := 0
	for f := range frames {
		if len(packet)+len(f) > 1150 {
			if err := c.send(packet); err != nil {
				return err
			}
			if packet, sent = packet[:0], sent+1; sent%32 == 0 {
				select {
				case <-time.After(2 * time.Millisecond):
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		packet = append(packet, f...)
	}
	return c.send(packet)
}

func streamFrame(id, offset uint64, data []byte) []byte {
	f := quicvarint.Append([]byte{0x0e}, id)
	f = quicvarint.Append(f, offset)
	f = quicvarint.Append(f, uint64(len(data)))
	return append(f, data...)
}

func cryptoFrame(offset uint64, data []byte) []byte {
	f := quicvarint.Append([]byte{0x06}, offset)
	return append(quicvarint.Append(f, uint64(len(data))), data...)
}

// pieceAttacks are frames that quic-go keeps, of which a window counts a small part.
var pieceAttacks = []struct {
	name   string
	frames func(yield func([]byte) bool)
}{
	{"bytes of a stream", func(yield func([]byte) bool) {
		for i := uint64(1); i < initialWindow-1024 && yield(streamFrame(40, i, []byte{1})); i++ {
		}
	}},
	{"bytes of many streams", func(yield func([]byte) bool) {
		for i := uint64(1); i <= 1000; i++ {
			for s := uint64(5); s < 30; s++ {
				if !yield(streamFrame(4*s, i, []byte{1})) {
					return
				}
			}
		}
	}},
	{"pieces just large enough for a buffer", func(yield func([]byte) bool) {
		for i := uint64(1); i+pooledFrame < initialWindow-1024; i += pooledFrame + 1 {
			if !yield(streamFrame(40, i, make([]byte, pooledFrame))) {
				return
			}
		}
	}},
	{"bytes of the handshake", func(yield func([]byte) bool) {
		for i := uint64(1); i < 16<<10 && yield(cryptoFrame(i, []byte{1})); i++ {
		}
	}},
}

// dialGreedy connects a client that lets the relay send as much as it likes, and that is
// far enough away for much to be in flight. Once its socket is muted it acknowledges
// nothing more.
func dialGreedy(ctx context.Context, t *testing.T, relay peer.AddrInfo) (*lightClient, *mutedSocket, error) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, nil, err
	}
	conn.SetReadBuffer(wantedBuffer) // so that little is lost
	socket := &mutedSocket{PacketConn: conn, delay: 50 * time.Millisecond}
	tr := &quicgo.Transport{Conn: socket}
	t.Cleanup(func() {
		socket.Close()
		tr.Close()
	})
	conf := lightConfig()
	conf.MaxIdleTimeout = time.Minute
	conf.InitialStreamReceiveWindow, conf.InitialConnectionReceiveWindow = 64<<20, 64<<20
	conf.MaxStreamReceiveWindow, conf.MaxConnectionReceiveWindow = 64<<20, 64<<20
	who, err := makeLightIdentity()
	if err != nil {
		return nil, nil, err
	}
	to, err := manet.ToNetAddr(relay.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return nil, nil, err
	}
	tlsConf, _ := who.tls.ConfigForPeer(relay.ID)
	tlsConf.KeyLogWriter = &socket.keys
	tlsConf.CurvePreferences = []tls.CurveID{tls.X25519}
	quicConn, err := tr.Dial(ctx, to, tlsConf, conf)
	if err != nil {
		return nil, nil, err
	}
	c := who.over(quicConn)
	go c.serve()
	return c, socket, nil
}

// puppet is a connection that quic-go has begun, like a rawConn, and that reads the numbers
// of the relay's packets, so that it can choose which it acknowledges.
type puppet struct {
	rawConn
	phases  [2]packetKeys // quic-go changes the keys once, after 100 packets, and then not for 100 000
	phase   byte
	relays  packetKeys // for the headers of the relay's packets
	largest uint32     // of the relay's packets
}

// takeOver mutes a client of dialGreedy, and goes on in its place.
func takeOver(socket *mutedSocket, relay peer.AddrInfo) (*puppet, error) {
	to, err := manet.ToNetAddr(relay.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return nil, err
	}
	own, err := loggedSecret(socket.keys.String(), "CLIENT_TRAFFIC_SECRET_0")
	if err != nil {
		return nil, err
	}
	relays, err := loggedSecret(socket.keys.String(), "SERVER_TRAFFIC_SECRET_0")
	if err != nil {
		return nil, err
	}
	socket.seen = make(chan []byte, 1<<14)
	socket.muted.Store(true)
	socket.mu.Lock()
	defer socket.mu.Unlock()
	p := &puppet{rawConn: rawConn{socket: socket, relay: to, id: socket.id, number: 1 << 20}}
	p.phases[0], _ = newPacketKeys(own)
	p.phases[1], _ = newPacketKeys(expandLabel(own, "quic ku", sha256.Size))
	p.phases[1].header = p.phases[0].header
	p.relays, _ = newPacketKeys(relays)
	return p, nil
}

// note reads the header of one of the relay's packets (RFC 9000, A.3).
func (p *puppet) note(packet []byte) {
	const at = 1 + 4 // after quic-go's connection ID
	if len(packet) < at+20 || packet[0]&0x80 != 0 {
		return
	}
	var mask [16]byte
	p.relays.header.Encrypt(mask[:], packet[at+4:at+20])
	first := packet[0] ^ mask[0]&0x1f
	length := int(first&3) + 1
	var short uint32
	for i := range length {
		short = short<<8 | uint32(packet[at+i]^mask[1+i])
	}
	window := uint32(1) << (8 * length) // 0 with four bytes, which are the whole number
	number := p.largest&^(window-1) | short
	if number+window/2 <= p.largest {
		number += window
	}
	if number > p.largest && number < p.largest+1<<20 {
		p.largest, p.phase = number, first>>2&1
	}
}

// send sends frames in a packet whose number leaves a gap, which the relay has to mention
// when it acknowledges.
func (p *puppet) send(frames []byte) {
	p.number += 1 << 7
	header := append([]byte{0x43 | p.phase<<2}, p.id...)
	p.socket.PacketConn.WriteTo(p.phases[p.phase].seal(header, p.number, frames), p.relay)
}

// loseAll makes the relay send all that is in flight again and again, in packets with more
// and less room, until ctx is done: it acknowledges only the last packet of each flight.
func (p *puppet) loseAll(ctx context.Context) {
	for n := 0; ctx.Err() == nil; {
		select {
		case packet := <-p.socket.seen:
			p.note(packet)
			if n++; n%3 == 0 {
				for range 1 + n%7 {
					p.send([]byte{0x01, 0, 0, 0}) // PING
				}
			}
		case <-time.After(3 * time.Millisecond): // longer than between two packets
			ack := quicvarint.Append([]byte{0x02}, uint64(p.largest))
			p.send(append(ack, 0, 0, 0, 0x01))
		}
	}
}

// Whoever acknowledges fast, and then nothing, keeps the relay from forgetting what it has
// sent. That takes no more memory than is promised.
func TestAttackUnacknowledged(t *testing.T) {
	for _, attack := range []struct {
		name  string
		chunk int           // bytes in a message
		every time.Duration // between messages; 0: as many as it takes
	}{
		{"bulk", 64 << 10, 0},
		{"small messages", 20, 50 * time.Microsecond},
	} {
		t.Run(attack.name, func(t *testing.T) {
			s, g, c := besieged(t, 8)
			chat := newChat(t, s)
			var circuits, delivered atomic.Int64
			var feeding sync.WaitGroup
			over, stop := context.WithCancel(context.Background())
			defer stop()
			feed := func(from *quicgo.Stream) {
				chunk := make([]byte, attack.chunk)
				for {
					if _, err := from.Write(chunk); err != nil {
						return
					}
					time.Sleep(attack.every)
				}
			}
			inParallel(t, sized(24, 250), 8, func(ctx context.Context, i int) error {
				to, socket, err := dialGreedy(ctx, t, s.bootstrap)
				if err != nil {
					return err
				}
				a, err := c.newcomer(ctx, s.bootstrap)
				if err != nil {
					return err
				}
				from, end, err := a.circuitTo(ctx, to)
				if err != nil {
					return nil // the relay has no more memory for circuits
				}
				circuits.Add(1)
				unlimited(from)
				feeding.Go(func() { feed(from) })
				context.AfterFunc(over, func() { from.CancelWrite(0) })
				end.SetDeadline(time.Now().Add(sized(time.Second, 3*time.Second)))
				n, _ := io.Copy(io.Discard, end)
				delivered.Add(n)
				socket.muted.Store(true)
				return nil
			})
			g.goesOn() // while the relay waits for acknowledgements
			t.Logf("%d circuits carried %d MiB; the relay has %d MiB", circuits.Load(), delivered.Load()>>20, s.rss(t)>>20)
			if circuits.Load() == 0 {
				t.Error("no circuit was opened")
			}
			chat.end()
			s.end(g)
			stop()
			feeding.Wait()
		})
	}
}

// What is sent in pieces of one byte takes no more memory than is promised, and who sends
// so pays with his connection, not others with theirs.
func TestAttackSmallPieces(t *testing.T) {
	for _, attack := range pieceAttacks {
		t.Run(attack.name, func(t *testing.T) {
			s, g, _ := besieged(t, 1)
			chat := newChat(t, s)
			n := sized(60, 250)
			inParallel(t, n, 8, func(ctx context.Context, i int) error {
				raw, err := dialRawLocally(ctx, t, s.bootstrap)
				if err != nil {
					return err
				}
				for range 2 { // some are lost
					if err := raw.sendAll(ctx, attack.frames); err != nil {
						return err
					}
				}
				return nil
			})
			g.goesOn() // while all of it is held
			t.Logf("%d connections; the relay has %d MiB", n, s.rss(t)>>20)
			chat.end()
			s.end(g)
		})
	}
}

// chat is an honest circuit of small messages, of which one end reads late, so that
// hundreds of small pieces wait for it.
type chat struct {
	t    *testing.T
	stop func()
	sent atomic.Int64
	err  atomic.Pointer[error] // the first
}

func newChat(t *testing.T, s *siege) *chat {
	t.Helper()
	c := loopbackCrowd(t, "127.0.0.3", 1)
	a, b := c.pair(testContext(t), t, testRelay{info: s.bootstrap}, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
	from, to, err := a.circuitTo(testContext(t), b)
	if err != nil {
		t.Fatal(err)
	}
	unlimited(from, to)
	ch := &chat{t: t}
	ctx, cancel := context.WithCancel(context.Background())
	var chatting sync.WaitGroup
	fail := func(err error) {
		if err != nil && ctx.Err() == nil {
			ch.err.CompareAndSwap(nil, &err)
		}
	}
	chatting.Go(func() {
		for ctx.Err() == nil {
			_, err := from.Write(bytes.Repeat([]byte("m"), 60))
			if fail(err); err != nil {
				return
			}
			ch.sent.Add(1)
			select {
			case <-time.After(200 * time.Microsecond): // or quic-go puts them together
			case <-ctx.Done():
			}
		}
	})
	chatting.Go(func() {
		late := time.NewTicker(300 * time.Millisecond)
		defer late.Stop()
		buf := make([]byte, 256<<10)
		for ctx.Err() == nil {
			select {
			case <-late.C:
			case <-ctx.Done():
				return
			}
			if _, err := to.Read(buf); err != nil {
				fail(err)
				return
			}
		}
	})
	ch.stop = sync.OnceFunc(func() {
		cancel()
		from.CancelWrite(0)
		to.CancelRead(0)
		chatting.Wait()
	})
	t.Cleanup(ch.stop)
	return ch
}

// end fails the test if the circuit has ended.
func (c *chat) end() {
	c.t.Helper()
	before := c.sent.Load()
	eventually(c.t, "the honest circuit goes on", func() bool { return c.sent.Load() > before+20 || c.err.Load() != nil })
	if err := c.err.Load(); err != nil {
		c.t.Errorf("an honest circuit of small messages: %v", *err)
	}
	c.stop()
	c.t.Logf("honest circuit: %d small messages sent", c.sent.Load())
}

// Control frames without end, and no acknowledgement of what the relay answers, take no
// more than is promised.
func TestAttackControlFrames(t *testing.T) {
	for _, attack := range []struct {
		name string
		do   func(ctx context.Context, c *rawConn) error
	}{
		{"NEW_CONNECTION_ID, each retiring the last", func(ctx context.Context, c *rawConn) error {
			return c.sendAll(ctx, func(yield func([]byte) bool) {
				for i := uint64(10); i < sized[uint64](20_000, 200_000); i++ {
					f := quicvarint.Append([]byte{0x18}, i)
					f = quicvarint.Append(f, i)
					f = append(f, 4)
					f = binary.BigEndian.AppendUint32(f, uint32(i))
					if f = append(f, make([]byte, 16)...); !yield(f) {
						return
					}
				}
			})
		}},
		{"RETIRE_CONNECTION_ID", func(ctx context.Context, c *rawConn) error {
			return c.sendAll(ctx, func(yield func([]byte) bool) {
				for i := range sized[uint64](20_000, 200_000) {
					if !yield(quicvarint.Append([]byte{0x19}, i)) {
						return
					}
				}
			})
		}},
		{"PATH_CHALLENGE", func(ctx context.Context, c *rawConn) error {
			return c.sendAll(ctx, func(yield func([]byte) bool) {
				for i := range sized(20_000, 200_000) {
					if !yield(binary.BigEndian.AppendUint64([]byte{0x1a}, uint64(i))) {
						return
					}
				}
			})
		}},
		{"STOP_SENDING that is never answered", func(ctx context.Context, c *rawConn) error {
			return c.sendAll(ctx, func(yield func([]byte) bool) {
				for i := range sized[uint64](20_000, 200_000) {
					id := 4 * (10 + i%20)
					if !yield(streamFrame(id, 0, []byte("\x13/multi"))) || !yield(append(quicvarint.Append([]byte{0x05}, id), 0)) {
						return
					}
				}
			})
		}},
		{"pings", func(ctx context.Context, c *rawConn) error {
			return c.sendAll(ctx, func(yield func([]byte) bool) {
				for range sized(200_000, 2_000_000) {
					if !yield([]byte{0x01}) {
						return
					}
				}
			})
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			s, g, _ := besieged(t, 1)
			inParallel(t, sized(40, 250), 8, func(ctx context.Context, i int) error {
				raw, err := dialRawLocally(ctx, t, s.bootstrap)
				if err != nil {
					return err
				}
				return attack.do(ctx, raw)
			})
			g.goesOn()
			t.Logf("the relay has %d MiB", s.rss(t)>>20)
			s.end(g)
		})
	}
}

// Answers that the client gives no room for are held for ten seconds, and cost no more
// than what is booked for them.
func TestAttackAnswersWithoutRoom(t *testing.T) {
	s, g, c := besieged(t, 4)
	value := strings.Repeat("x", maxRecordValue)
	writer, err := c.dial(testContext(t), newLightIdentity(t), s.bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	if err := writer.putValue(testContext(t), "large", value); err != nil {
		t.Fatal(err)
	}
	conf := lightConfig()
	conf.InitialStreamReceiveWindow, conf.MaxStreamReceiveWindow = 64, 64 // the protocol's name fits
	var asked atomic.Int64
	inParallel(t, sized(100, 700), 8, func(ctx context.Context, i int) error {
		client, err := c.dialAs(ctx, newLightIdentity(t), s.bootstrap, conf)
		if err != nil {
			return err
		}
		var request bytes.Buffer
		request.WriteString("\x13/multistream/1.0.0\n\x10" + string(kadProtocol) + "\n")
		for range 3 {
			protodelim.MarshalTo(&request, kadpb.NewMessage(kadpb.Message_GET_VALUE, []byte(recordPrefix+"syncgroup/large"), 0))
		}
		for range maxIncomingStreams {
			stream, err := client.OpenStream()
			if err != nil {
				break
			}
			stream.Write(request.Bytes())
			asked.Add(1)
		}
		return nil
	})
	g.goesOn()
	t.Logf("%d requests whose answers are not read; the relay has %d MiB", asked.Load(), s.rss(t)>>20)
	s.end(g)
}

// dialAs is dial with another QUIC configuration.
func (c *crowd) dialAs(ctx context.Context, who lightIdentity, relay peer.AddrInfo, conf *quicgo.Config) (*lightClient, error) {
	addr, err := manet.ToNetAddr(relay.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return nil, err
	}
	tlsConf, _ := who.tls.ConfigForPeer(relay.ID)
	conn, err := c.transport().Dial(ctx, addr, tlsConf, conf)
	if err != nil {
		return nil, err
	}
	client := who.over(conn)
	go client.serve()
	return client, nil
}

// One address that takes all that is shared, with windows, circuits and idle streams that
// are each within its rights, leaves discovery, newcomers and reservations to the others.
func TestAttackSharedMemory(t *testing.T) {
	s, g, c := besieged(t, 8)
	var circuits, streams atomic.Int64
	inParallel(t, sized(30, 128), 8, func(ctx context.Context, i int) error {
		a, err := c.dial(ctx, newLightIdentity(t), s.bootstrap)
		if err != nil {
			return err
		}
		b, err := c.dial(ctx, newLightIdentity(t), s.bootstrap)
		if err != nil {
			return err
		}
		if err := b.reserve(ctx); err != nil {
			return nil // all is taken
		}
		b.acceptAll()
		var open []*quicgo.Stream
		for range circuitsPerPair {
			from, err := a.circuit(ctx, b.id)
			if err != nil {
				break
			}
			circuits.Add(1)
			open = append(open, from)
		}
		for _, client := range []*lightClient{a, b} {
			for range maxIncomingStreams {
				room, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
				_, err := client.open(room, string(proto.ProtoIDv2Hop))
				cancel()
				if err != nil {
					break
				}
				streams.Add(1)
			}
		}
		// At last, as nothing else gets through once the connection's window is full.
		for _, from := range open {
			from.SetDeadline(time.Now().Add(sized(500*time.Millisecond, 3*time.Second)))
			io.CopyN(from, zeros{}, 1<<20)
		}
		return nil
	})
	g.goesOn()
	// A newcomer from elsewhere is let in, told of, and gets a reservation.
	newcomer, err := g.crowd.dial(testContext(t), newLightIdentity(t), s.bootstrap)
	if err != nil {
		t.Fatalf("a newcomer: %v", err)
	}
	eventually(t, "the newcomer is named", func() bool { ok, _ := g.b.named(testContext(t), newcomer.id); return ok })
	if err := newcomer.reserve(testContext(t)); err != nil {
		t.Errorf("the newcomer's reservation: %v", err)
	}
	t.Logf("%d circuits that nobody reads and %d idle streams", circuits.Load(), streams.Load())
	s.end(g)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// Requests without end from one address leave the CPU to the others.
func TestAttackRequests(t *testing.T) {
	for _, attack := range []struct {
		name string
		do   func(ctx context.Context, c *lightClient) (n int64)
	}{
		{"FIND_NODE, one after another on a stream", func(ctx context.Context, c *lightClient) (n int64) {
			s, err := c.open(ctx, string(kadProtocol))
			if err != nil {
				return 0
			}
			r := &byteReader{Reader: s}
			for {
				if _, err := protodelim.MarshalTo(s, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(c.id), 0)); err != nil {
					return n
				}
				if protodelim.UnmarshalFrom(r, new(kadpb.Message)) != nil {
					return n
				}
				n++
			}
		}},
		{"identify", func(ctx context.Context, c *lightClient) (n int64) {
			for ctx.Err() == nil {
				s, err := c.open(ctx, identify.ID)
				if err != nil {
					break
				}
				io.Copy(io.Discard, s)
				s.Close()
				n++
			}
			return n
		}},
		{"pings, of which sixteen count as a request", func(ctx context.Context, c *lightClient) (n int64) {
			s, err := c.open(ctx, "/ipfs/ping/1.0.0")
			if err != nil {
				return 0
			}
			pings := make([]byte, readsPerRequest*32)
			for {
				if _, err := s.Write(pings); err != nil {
					return n
				}
				if _, err := io.ReadFull(s, pings); err != nil {
					return n
				}
				n++
			}
		}},
		{"protocols that the relay does not speak, eight as a request", func(ctx context.Context, c *lightClient) (n int64) {
			proposals, refusals := bytes.Repeat([]byte("\x02x\n"), readsPerRequest/2), make([]byte, readsPerRequest/2*len("\x03na\n"))
			for ctx.Err() == nil {
				s, err := c.OpenStreamSync(ctx)
				if err != nil {
					return n
				}
				context.AfterFunc(ctx, func() { s.CancelRead(0) })
				s.Write([]byte("\x13/multistream/1.0.0\n"))
				_, err = io.ReadFull(s, make([]byte, 20))
				for err == nil { // for the ten seconds that negotiation may take
					s.Write(proposals)
					if _, err = io.ReadFull(s, refusals); err == nil {
						n++
					}
				}
				s.CancelWrite(0)
			}
			return n
		}},
		{"streams opened and reset", func(ctx context.Context, c *lightClient) (n int64) {
			for ctx.Err() == nil {
				s, err := c.OpenStreamSync(ctx)
				if err != nil {
					break
				}
				s.Write([]byte("\x13"))
				s.CancelWrite(0)
				s.CancelRead(0)
				n++
			}
			return n
		}},
	} {
		t.Run(attack.name, func(t *testing.T) {
			l := newLab(t)
			s := l.siege(t)
			honestNS, attackerNS := l.public("honest", "11.0.0.2/8"), l.public("attacker", "11.0.0.3/8")
			g := newGroup(t, newCrowdFrom(t, l.sockets(honestNS, "11.0.0.2", 1)), s.bootstrap)
			c := newCrowdFrom(t, l.sockets(attackerNS, "11.0.0.3", 4))
			ctx, cancel := context.WithTimeout(context.Background(), sized(4*time.Second, 30*time.Second))
			defer cancel()
			began, cpu := time.Now(), s.cpu(t)
			var n atomic.Int64
			var attacking sync.WaitGroup
			for range 4 {
				client, err := c.dial(ctx, newLightIdentity(t), s.bootstrap)
				if err != nil {
					t.Fatal(err)
				}
				for range 8 {
					attacking.Go(func() { n.Add(attack.do(ctx, client)) })
				}
			}
			took := g.timed(ctx)
			attacking.Wait()
			elapsed := time.Since(began).Seconds()
			t.Logf("%d requests in %.1f s, %.2f of a core; the group's requests took %v, 99 %% within %v",
				n.Load(), elapsed, (s.cpu(t)-cpu).Seconds()/elapsed, percentile(took, 0.5), percentile(took, 0.99))
			// Streams that nobody has accepted wait in QUIC, and those that can be open at once.
			if most := float64(256*requestsPerClient) + 256*requestsPerSecond*elapsed + 4*2*maxIncomingStreams; float64(n.Load()) > most {
				t.Errorf("%d requests were served, want at most %.0f", n.Load(), most)
			}
			s.end(g)
		})
	}
}

// timed looks for the mate until ctx is done, and returns how long each try took.
func (g *group) timed(ctx context.Context) (took []time.Duration) {
	for ctx.Err() == nil {
		began := time.Now()
		if g.look(ctx) == nil {
			took = append(took, time.Since(began))
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	slices.Sort(took)
	return took
}

// Frames with gaps between them make quic-go look through a long list for each. Whoever
// sends such is slowed down.
func TestAttackGaps(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	honestNS, attackerNS := l.public("honest", "11.0.0.2/8"), l.public("attacker", "11.0.0.3/8")
	g := newGroup(t, newCrowdFrom(t, l.sockets(honestNS, "11.0.0.2", 1)), s.bootstrap)
	raw, err := dialRaw(testContext(t), t, l.sockets(attackerNS, "11.0.0.3", 1)[0], s.bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), sized(4*time.Second, 30*time.Second))
	defer cancel()
	began, cpu := time.Now(), s.cpu(t)
	timed := make(chan []time.Duration)
	go func() { timed <- g.timed(ctx) }()
	sent := 0
	for ctx.Err() == nil {
		raw.sendAll(ctx, func(yield func([]byte) bool) {
			for i := uint64(900); i > 0; i-- {
				if sent += 7; !yield(streamFrame(40, 2*i, []byte{1})) {
					return
				}
			}
		})
		select { // a megabyte a second
		case <-time.After(6 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	took, elapsed := <-timed, time.Since(began).Seconds()
	t.Logf("%.2f MB/s of frames, %.2f of a core; the group's requests took %v, 99 %% within %v",
		float64(sent)/elapsed/1e6, (s.cpu(t)-cpu).Seconds()/elapsed, percentile(took, 0.5), percentile(took, 0.99))
	s.end(g)
}

// Two devices that put one group's record at the same moment: the record is one of the
// two, whole, and each device is told of the other.
func TestTwoPutsAtOnce(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 2)
	for round := range sized(50, 1000) {
		key := []byte(fmt.Sprint(recordPrefix, "syncgroup/", round))
		inParallel(t, 2, 2, func(ctx context.Context, i int) error {
			_, err := clients[i].ask(ctx, putMessage(key, clients[i].id))
			return err
		})
		resp, err := clients[0].ask(testContext(t), getMessage(key))
		if err != nil {
			t.Fatal(err)
		}
		extras, err := readExtras(resp.GetRecord())
		if err != nil || extras.publisher != clients[0].id && extras.publisher != clients[1].id {
			t.Fatalf("round %d: the publisher is %v, %v, want one of the two", round, extras.publisher, err)
		}
		for i, c := range clients {
			if _, named := c.mustAsk(t, getMessage(key))[clients[1-i].id]; !named {
				t.Errorf("round %d: device %d is not told of the other", round, i)
			}
		}
	}
}

// Initials without end, to mates that do not answer, from all connections of one address:
// two devices elsewhere are joined by a bridge all the same.
func TestAttackBridges(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	ns := []string{l.public("honest", "11.0.0.2/8"), l.public("mate", "11.0.0.4/8"), l.public("attacker", "11.0.0.3/8")}
	g := newGroup(t, newCrowdFrom(t, l.sockets(ns[0], "11.0.0.2", 1)), s.bootstrap)
	target := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("11.0.0.1:4001"))
	join := func(ctx context.Context, c *crowd) (*lightClient, error) {
		who, err := makeLightIdentity()
		if err != nil {
			return nil, err
		}
		who.sees = s.bootstrap.Addrs[0]
		return c.dial(ctx, who, s.bootstrap)
	}
	attackers := make([]*lightClient, sized(64, 240))
	groups := func(i int) []byte { return []byte(fmt.Sprint(recordPrefix, "syncgroup/", i/groupMembers)) }
	crowd := newCrowdFrom(t, l.sockets(ns[2], "11.0.0.3", len(attackers))) // a socket for each
	inParallel(t, len(attackers), 8, func(ctx context.Context, i int) (err error) {
		if attackers[i], err = join(ctx, crowd); err != nil {
			return err
		}
		_, err = attackers[i].ask(ctx, putMessage(groups(i), attackers[i].id))
		return err
	})
	ctx, cancel := context.WithCancel(context.Background())
	var attacking sync.WaitGroup
	defer cancel()
	var dials atomic.Int64
	for i, client := range attackers {
		attacking.Go(func() {
			for ctx.Err() == nil {
				if _, err := client.ask(ctx, getMessage(groups(i))); err != nil {
					return
				}
				for range 2 * groupMembers { // the mate that it was told of, and all others
					packet, err := initialPacket(newConnID(), nil, 0, []byte{1})
					if err != nil {
						panic(err) // of a cipher that we have
					}
					client.transport.WriteTo(packet, target)
					dials.Add(1)
				}
				select {
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	n, met := sized(10, 40), 0 // pairs
	var took []time.Duration
	for range n {
		a, err := join(testContext(t), newCrowdFrom(t, l.sockets(ns[0], "11.0.0.2", 1)))
		if err != nil {
			t.Fatal(err)
		}
		b, err := join(testContext(t), newCrowdFrom(t, l.sockets(ns[1], "11.0.0.4", 1)))
		if err != nil {
			t.Fatal(err)
		}
		try, stop := context.WithTimeout(context.Background(), testTimeout)
		began := time.Now()
		if _, err := overBridge(try, a, b); err != nil {
			t.Log(err)
		} else {
			met++
			took = append(took, time.Since(began))
		}
		stop()
	}
	slices.Sort(took)
	t.Logf("beside %d Initials, %d of %d pairs met, in %v, 99 %% within %v", dials.Load(), met, n, percentile(took, 0.5), percentile(took, 0.99))
	if met < n {
		t.Errorf("%d of %d pairs met", met, n)
	}
	cancel()
	attacking.Wait() // while the relay still answers
	s.end(g)
}
