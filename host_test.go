package main

// Whether a libp2p host leaves anything behind, and what its TLS says to whom.

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	p2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	quicgo "github.com/quic-go/quic-go"
)

// A relay that cannot start returns an error, and leaves nothing that still runs.
func TestHostThatFailsLeavesNothingBehind(t *testing.T) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	before := runtime.NumGoroutine()
	for range 20 {
		resources := &closedResources{}
		h, err := newQUICHost(hostParts{key: key, transport: noProtocols{}, resources: resources,
			addrBook: func(_ peer.ID, store addrStore) peerstore.Peerstore { return store }})
		if err == nil {
			h.Close()
			t.Fatal("a host without a protocol was made")
		}
		if !resources.closed {
			t.Fatal("the resource manager was left open")
		}
	}
	eventually(t, "its goroutines have ended", func() bool { return runtime.NumGoroutine() <= before })
}

// A relay that has dialled a lost one for hours still dials the others, and the lost one
// when it is back.
func TestHostDialsOnAfterManyFailures(t *testing.T) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := libp2pquic.NewTransport(key, nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	nobody := &nobodyAnswers{Transport: transport}
	h, err := newQUICHost(hostParts{key: key, transport: nobody, resources: &network.NullResourceManager{},
		addrBook:  func(_ peer.ID, store addrStore) peerstore.Peerstore { return store },
		advertise: func([]ma.Multiaddr) []ma.Multiaddr { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, addr := range []string{"/ip4/1.1.1.1/udp/4001/quic-v1", "/ip6/2606:4700::1/udp/4001/quic-v1"} {
		lost := newLightIdentity(t).id
		h.Peerstore().AddAddr(lost, ma.StringCast(addr), peerstore.PermanentAddrTTL)
		for range 300 {
			h.Network().(*swarm.Swarm).Backoff().Clear(lost)
			dialled := nobody.dialled
			_, err := h.Network().DialPeer(testContext(t), lost)
			if nobody.dialled == dialled {
				t.Fatalf("%s was not dialled after %d failures: %v", addr, dialled, err)
			}
		}
	}
}

// A relay whose clock was hours off when it started serves clients whose clocks are
// right, and the other way round: its certificate is made once, by its own clock.
func TestCertificateIsGoodByAnyClock(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	for _, shift := range []time.Duration{0, -3 * time.Hour, 2 * time.Hour, -30 * 365 * 24 * time.Hour, 150 * 365 * 24 * time.Hour} {
		clock := time.Now().Add(shift)
		_, err := dialTLS(t, r, []string{alpn}, func(raw [][]byte, _ [][]*x509.Certificate) error {
			cert, err := x509.ParseCertificate(raw[0])
			if err != nil {
				return err
			}
			roots := x509.NewCertPool()
			roots.AddCert(cert)
			_, err = cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: clock})
			return err
		})
		if err != nil {
			t.Errorf("a client whose clock says %v: %v", clock, err)
		}
	}
}

// A client of another protocol is told what is wrong, in the words of TLS.
func TestWrongALPNGetsItsAlert(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	for _, offered := range [][]string{{"h3"}, {"quic-echo", "h3"}, nil} {
		_, err := dialTLS(t, r, offered, nil)
		const noApplicationProtocol = 0x100 + 120 // RFC 9001, 4.8; RFC 8446, 6.2
		var refused *quicgo.TransportError
		if !errors.As(err, &refused) || refused.ErrorCode != noApplicationProtocol || !refused.Remote {
			t.Errorf("offering %q: %v, want the relay's alert no_application_protocol", offered, err)
		}
	}
	if conn, err := dialTLS(t, r, []string{"h3", alpn}, nil); err != nil || conn.ConnectionState().TLS.NegotiatedProtocol != alpn {
		t.Errorf("offering ours among others: %v", err)
	}
}

// Nobody gets in under another device's ID: a certificate has to be signed with the key
// of the ID that it names, although the handshake itself does not look at that.
func TestCertificateHasToProveItsID(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	victim := newLightIdentity(t)
	own, other := ecdsaKey(t), ecdsaKey(t)
	signed := func(key *ecdsa.PrivateKey) []pkix.Extension {
		ext, err := p2ptls.GenerateSignedExtension(victim.key, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		return []pkix.Extension{ext}
	}
	forged := signed(own)
	forged[0].Value = bytes.Clone(forged[0].Value)
	forged[0].Value[len(forged[0].Value)-1] ^= 1
	for _, c := range []struct {
		name string
		ext  []pkix.Extension
		end  time.Time
		ok   bool
	}{
		{"no ID", nil, time.Now().Add(time.Hour), false},
		{"another certificate's proof", signed(other), time.Now().Add(time.Hour), false},
		{"a forged signature", forged, time.Now().Add(time.Hour), false},
		{"an expired certificate", signed(own), time.Now().Add(-time.Hour), false},
		{"a good one", signed(own), time.Now().Add(time.Hour), true},
	} {
		template, err := certificateTemplate()
		if err != nil {
			t.Fatal(err)
		}
		template.NotAfter, template.ExtraExtensions = c.end, c.ext
		der, err := x509.CreateCertificate(rand.Reader, template, template, own.Public(), own)
		if err != nil {
			t.Fatal(err)
		}
		conf := &tls.Config{
			InsecureSkipVerify: true,
			NextProtos:         []string{alpn},
			Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: own}},
		}
		addr, err := manet.ToNetAddr(r.info.Addrs[0][:2])
		if err != nil {
			t.Fatal(err)
		}
		conn, err := quicgo.DialAddr(testContext(t), addr.String(), conf, lightConfig())
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		connected := func() bool { return r.host.Network().Connectedness(victim.id) == network.Connected }
		if c.ok {
			eventually(t, c.name+" gets in", connected)
			conn.CloseWithError(0, "")
			continue
		}
		eventually(t, c.name+" is refused", func() bool { return conn.Context().Err() != nil })
		var refused *quicgo.ApplicationError
		if err := context.Cause(conn.Context()); !errors.As(err, &refused) || !refused.Remote {
			t.Errorf("%s: %v, want that the relay closes the connection", c.name, err)
		}
		if connected() {
			t.Errorf("%s got in under another device's ID", c.name)
		}
	}
}

func ecdsaKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Clients with keys of all kinds get in, and those whose certificates would take much
// memory do not.
func TestCertificatesOfClients(t *testing.T) {
	for _, kind := range []struct {
		name string
		typ  int
		bits int
	}{
		{"Ed25519", crypto.Ed25519, 0}, {"ECDSA", crypto.ECDSA, 0}, {"Secp256k1", crypto.Secp256k1, 0}, {"RSA", crypto.RSA, 2048},
	} {
		key, _, err := crypto.GenerateKeyPair(kind.typ, kind.bits)
		if err != nil {
			t.Fatal(err)
		}
		who, err := p2ptls.NewIdentity(key)
		if err != nil {
			t.Fatal(err)
		}
		conf, _ := who.ConfigForPeer("")
		cert, err := x509.ParseCertificate(conf.Certificates[0].Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := thin([]*x509.Certificate{cert}); err != nil {
			t.Errorf("%s: %v", kind.name, err)
		}
		rest := len(cert.Raw) - len(cert.RawSubjectPublicKeyInfo) - len(cert.Signature)
		for _, e := range cert.Extensions {
			if e.Id.Equal(keyExtension) {
				rest -= len(e.Value)
			}
		}
		t.Logf("%s: %d bytes, %d beside keys and signatures", kind.name, len(cert.Raw), rest)
		cert.Raw = append(cert.Raw, make([]byte, maxCertificateRest)...)
		if thin([]*x509.Certificate{cert}) == nil {
			t.Errorf("%s: %d bytes more are accepted", kind.name, maxCertificateRest)
		}
	}
}

// No certificate stops the relay, whatever the standard library makes of it.
func TestPanicAtACertificateIsAnError(t *testing.T) {
	if survives([]*x509.Certificate{nil}) == nil { // at which x509 panics
		t.Error("no error, want one")
	}
}

// dialTLS connects to r with a client's certificate and these protocols. verify may
// replace the check of the relay's certificate.
func dialTLS(t *testing.T, r testRelay, protocols []string, verify func([][]byte, [][]*x509.Certificate) error) (*quicgo.Conn, error) {
	t.Helper()
	addr, err := manet.ToNetAddr(r.info.Addrs[0][:2])
	if err != nil {
		t.Fatal(err)
	}
	conf, _ := newLightIdentity(t).tls.ConfigForPeer(r.info.ID)
	conf.NextProtos = protocols
	if verify != nil {
		conf.VerifyPeerCertificate = verify
	}
	conn, err := quicgo.DialAddr(testContext(t), addr.String(), conf, lightConfig())
	if err == nil {
		t.Cleanup(func() { conn.CloseWithError(0, "") })
	}
	return conn, err
}

// closedResources remembers that it was closed.
type closedResources struct {
	network.NullResourceManager
	closed bool
}

func (r *closedResources) Close() error {
	r.closed = true
	return nil
}

// nobodyAnswers is a transport whose dials fail. It sends nothing.
type nobodyAnswers struct {
	transport.Transport
	dialled int // the swarm dials one address at a time if there is only one
}

func (n *nobodyAnswers) Dial(context.Context, ma.Multiaddr, peer.ID) (transport.CapableConn, error) {
	n.dialled++
	return nil, errors.New("no answer")
}

// noProtocols is a transport that no swarm accepts.
type noProtocols struct{ transport.Transport }

func (noProtocols) Protocols() []int { return nil }
