//go:build linux

package main

// What costs the relay far more than it costs the attacker to send, in ways that no
// library counts: messages and certificates of empty parts, header lines, answers that
// wait.
//
// As in lab_attacks_test.go, an honest group is there meanwhile, the relay has the memory
// that its log promises, and ATTACKS=full is for the whole size.

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	p2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/multiformats/go-multistream"
	quicgo "github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
)

// Certificates with thousands of names, which crypto/tls keeps as long as the connection
// lasts, do not get in.
func TestAttackCertificates(t *testing.T) {
	s, g, c := besieged(t, 8)
	conf := lightConfig()
	conf.InitialPacketSize = 1400 // or more datagrams than the gate lets through
	inParallel(t, sized(500, siegeClients-100), 16, func(ctx context.Context, i int) error {
		who, err := manyNames(3000)
		if err != nil {
			return err
		}
		c.dialAs(ctx, who, s.bootstrap, conf) // may fail
		return nil
	})
	g.goesOn()
	t.Logf("the relay has %d MiB", s.rss(t)>>20)
	s.end(g)
}

// manyNames makes an identity whose certificate has that many names, each a URI of a byte.
func manyNames(n int) (who lightIdentity, err error) {
	if who, err = makeLightIdentity(); err != nil {
		return who, err
	}
	names, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: bytes.Repeat([]byte{0x86, 1, 'a'}, n)})
	if err != nil {
		return who, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62)) // so that crypto/tls cannot share it
	if err != nil {
		return who, err
	}
	who.tls, err = p2ptls.NewIdentity(who.key, p2ptls.WithCertTemplate(&x509.Certificate{
		SerialNumber:    serial,
		NotBefore:       time.Now().Add(-time.Hour),
		NotAfter:        time.Now().Add(time.Hour),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: names}},
	}))
	return who, err
}

// Identify messages of thousands of empty addresses, which never end, take no more memory
// than is promised, and who sends them pays with his connection.
func TestAttackIdentifyParts(t *testing.T) {
	var part []byte
	for len(part) < 8000 {
		part = append(part, 0x12, 0) // listenAddrs
	}
	part = append(binary.AppendUvarint(nil, uint64(len(part))), part...)
	s, g, c := besieged(t, 8)
	chat := newChat(t, s)
	var pushed atomic.Int64
	inParallel(t, sized(300, siegeClients-100), 32, func(ctx context.Context, i int) error {
		client, err := c.newcomer(ctx, s.bootstrap)
		if err != nil {
			return err
		}
		for _, parts := range []int{1, 1, 1, 1, 9} {
			stream, err := client.open(ctx, identify.IDPush)
			if err != nil {
				return nil // the relay is about to close the connection
			}
			if _, err := stream.Write(bytes.Repeat(part, parts)); err == nil {
				pushed.Add(int64(parts))
			}
		}
		return nil
	})
	g.goesOn()
	t.Logf("%d parts of 8 KiB; the relay has %d MiB", pushed.Load(), s.rss(t)>>20)
	chat.end()
	s.end(g)
}

// HTTP requests in thousands of lines take no more memory than is counted for a
// connection.
func TestAttackHTTPLines(t *testing.T) {
	const begin = "GET " + identityRoute + " HTTP/1.1\r\nHost: a\r\n"
	var short, long strings.Builder
	for i := 0; short.Len() < 7<<10; i++ {
		fmt.Fprintf(&short, "%c%c:\r\n", 'A'+i%26, 'a'+i/26%26)
	}
	for i := range maxHTTPLines - 4 {
		fmt.Fprintf(&long, "%c%c: %s\r\n", 'A'+i%26, 'a'+i/26, strings.Repeat("x", 120))
	}
	for _, attack := range []struct{ name, header string }{
		{"short lines", short.String()},
		{"long lines", long.String()},
		{"one line", "A: " + strings.Repeat("x", 7<<10)},
	} {
		t.Run(attack.name, func(t *testing.T) {
			s, g, _ := besieged(t, 1)
			before := s.rss(t)
			inParallel(t, 2*maxHTTPConns, 32, func(ctx context.Context, i int) error {
				c, err := net.Dial("tcp", strings.TrimPrefix(s.http, "http://"))
				if err != nil {
					return err
				}
				t.Cleanup(func() { c.Close() })
				c.Write([]byte(begin + attack.header)) // the relay may have closed it
				return nil
			})
			g.goesOn()
			took := s.peakRSS(t) - before
			t.Logf("requests in %s took %d MiB", attack.name, took>>20)
			if most := int64(maxHTTPConns*httpConnMemory + minGarbage); took > most {
				t.Errorf("they took %d MiB, want at most %d", took>>20, most>>20)
			}
			s.end(g)
		})
	}
}

// HTTP requests without end from one address leave the CPU to the others.
func TestAttackHTTPRequests(t *testing.T) {
	l := newLab(t)
	s := l.siege(t)
	g := newGroup(t, newCrowdFrom(t, l.sockets(l.public("honest", "11.0.0.2/8"), "11.0.0.2", 1)), s.bootstrap)
	attacker := l.public("attacker", "11.0.0.3/8")
	requests := bytes.Repeat([]byte("GET "+identityRoute+" HTTP/1.1\r\nHost: a\r\n\r\n"), 20)
	ctx, cancel := context.WithTimeout(context.Background(), sized(4*time.Second, 30*time.Second))
	defer cancel()
	began, cpu := time.Now(), s.cpu(t)
	var answered atomic.Int64
	var attacking sync.WaitGroup
	for range 64 {
		attacking.Go(func() {
			var c net.Conn
			err := within(attacker, func() (err error) {
				c, err = net.Dial("tcp", "11.0.0.1:4002")
				return err
			})
			if err != nil {
				t.Error(err)
				return
			}
			context.AfterFunc(ctx, func() { c.Close() })
			attacking.Go(func() { answered.Add(countAnswers(c)) })
			for err == nil {
				_, err = c.Write(requests)
			}
		})
	}
	took := g.timed(ctx)
	attacking.Wait()
	elapsed := time.Since(began).Seconds()
	t.Logf("%d requests in %.1f s, %.2f of a core; the group's requests took %v, 99 %% within %v",
		answered.Load(), elapsed, (s.cpu(t)-cpu).Seconds()/elapsed, percentile(took, 0.5), percentile(took, 0.99))
	if most := httpBurst + httpRate*elapsed + 64; float64(answered.Load()) > most {
		t.Errorf("%d requests were answered, want at most %.0f", answered.Load(), most)
	}
	s.end(g)
}

// countAnswers reads HTTP answers until c is closed, and returns how many say 200.
func countAnswers(c io.Reader) (n int64) {
	const good = "HTTP/1.1 200 OK"
	buf := make([]byte, 0, 64<<10)
	for {
		k, err := c.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+k]
		n += int64(bytes.Count(buf, []byte(good)))
		// What could be the first part of an answer waits for the rest.
		rest := buf[max(0, len(buf)-len(good)+1):]
		buf = buf[:copy(buf, rest)]
		if err != nil {
			return n
		}
	}
}

// Requests of thousands of empty parts cost their senders' networks as much of their
// budgets as they cost the relay, and wait before anything is allocated for them.
func TestAttackLongRequests(t *testing.T) {
	const networks, streams, length = 4, 8, maxKadMessage - 2
	var requests bytes.Buffer
	requests.WriteString("\x13/multistream/1.0.0\n\x10" + string(kadProtocol) + "\n")
	protodelim.MarshalTo(&requests, findMessage([]byte("anybody")))
	long := append(binary.AppendUvarint(nil, length), 0x08, 5) // PING
	long = append(long, bytes.Repeat([]byte{0x42, 0}, length/2-1)...)
	for range 12 {
		requests.Write(long)
	}

	l := newLab(t)
	s := l.siege(t)
	g := newGroup(t, newCrowdFrom(t, l.sockets(l.public("honest", "11.0.0.2/8"), "11.0.0.2", 1)), s.bootstrap)
	var crowds []*crowd
	for i := range networks {
		ip := fmt.Sprintf("11.0.0.%d", 10+i)
		crowds = append(crowds, newCrowdFrom(t, l.sockets(l.public(fmt.Sprint("attacker", i), ip+"/8"), ip, 2)))
	}
	began, cpu := time.Now(), s.cpu(t)
	var asked, answered atomic.Int64
	inParallel(t, sized(400, 900), 32, func(ctx context.Context, i int) error {
		client, err := crowds[i%networks].newcomer(ctx, s.bootstrap)
		if err != nil {
			return err
		}
		for range streams {
			stream, err := client.OpenStream()
			if err != nil {
				return nil
			}
			stream.SetDeadline(time.Now().Add(testTimeout))
			go stream.Write(requests.Bytes())
			go func() { // ends with the relay
				r := &byteReader{Reader: stream}
				if multistream.SelectProtoOrFail(string(kadProtocol), answersOnly{stream}) != nil || protodelim.UnmarshalFrom(r, new(kadpb.Message)) != nil {
					return
				}
				for asked.Add(1); protodelim.UnmarshalFrom(r, new(kadpb.Message)) == nil; {
					answered.Add(1)
				}
			}()
		}
		return nil
	})
	g.goesOn()
	elapsed := time.Since(began).Seconds()
	t.Logf("%d long requests answered in %.1f s, %.2f of a core; the relay has %d MiB",
		answered.Load(), elapsed, (s.cpu(t)-cpu).Seconds()/elapsed, s.rss(t)>>20)
	const each = 1 + length/freeKadMessage
	if spent, most := asked.Load()+each*answered.Load(), networks*256*(requestsPerClient+requestsPerSecond*elapsed); float64(spent) > most {
		t.Errorf("%d long requests were answered, which cost %d of the budgets of %.0f", answered.Load(), spent, most)
	}
	s.end(g)
}

// answersOnly is a stream on which all has been sent.
type answersOnly struct{ *quicgo.Stream }

func (answersOnly) Write(p []byte) (int, error) { return len(p), nil }
