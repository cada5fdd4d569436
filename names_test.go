package main

// Tests of the names in --announce and --bootstrap, and of what they resolve to.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	ma "github.com/multiformats/go-multiaddr"
)

// fakeDNS answers what a test sets.
type fakeDNS struct {
	mu     sync.Mutex
	leadTo map[string][]string // IP addresses of each name; a name that is missing fails
	txt    []string
	asked  int
}

func (d *fakeDNS) set(name string, ips ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.leadTo == nil {
		d.leadTo = make(map[string][]string)
	}
	d.leadTo[name] = ips
}

func (d *fakeDNS) fail(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.leadTo, name)
}

func (d *fakeDNS) find(name string) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	ips, ok := d.leadTo[strings.TrimSuffix(name, ".")]
	if !ok {
		return nil, errors.New("server misbehaving")
	}
	return ips, nil
}

func (d *fakeDNS) LookupIPAddr(_ context.Context, name string) (addrs []net.IPAddr, err error) {
	ips, err := d.find(name)
	for _, ip := range ips {
		addrs = append(addrs, net.IPAddr{IP: net.ParseIP(ip)})
	}
	return addrs, err
}

func (d *fakeDNS) LookupTXT(context.Context, string) ([]string, error) { return d.txt, nil }

// A name's address changes, DNS goes down and comes back, and a relay starts before
// DNS is up: clients get the right addresses as soon as they can be known.
func TestNamesFollowDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dns, log := &fakeDNS{}, new(logBuffer)
		n := newNames(dns, slog.New(slog.NewTextHandler(log, nil)))
		name := ma.StringCast("/dns/relay.example.org/udp/4001/quic-v1")
		literal := ma.StringCast("/ip4/203.0.113.1/udp/4001/quic-v1")
		addrs := []ma.Multiaddr{name, literal}
		n.add(addrs...)
		changes := 0
		n.follow(func() { changes++ })
		defer n.close()

		want := func(when string, wantChanges int, ips ...string) {
			t.Helper()
			synctest.Wait()
			var want []string
			for _, ip := range ips {
				want = append(want, "/"+ip+"/udp/4001/quic-v1")
			}
			want = append(want, literal.String(), name.String())
			if got := strs(n.withIPs(addrs)); !slices.Equal(got, want) {
				t.Errorf("%s: clients get %v, want %v", when, got, want)
			}
			if changes != wantChanges {
				t.Errorf("%s: %d changes, want %d", when, changes, wantChanges)
			}
		}
		want("without DNS", 0)
		if line := log.line("name not resolved"); !strings.Contains(line, "name=relay.example.org") || !strings.Contains(line, "server misbehaving") {
			t.Errorf("log line %q, want one that names the name and the reason", line)
		}
		time.Sleep(time.Minute)
		dns.set("relay.example.org", "2001:db8::7", "203.0.113.7")
		time.Sleep(time.Minute)
		want("when DNS has come", 1, "ip4/203.0.113.7", "ip6/2001:db8::7")
		if line := log.line("name resolved"); !strings.Contains(line, "203.0.113.7") {
			t.Errorf("log line %q, want one with the address", line)
		}
		dns.set("relay.example.org", "203.0.113.7", "2001:db8::7")
		time.Sleep(time.Hour)
		want("after an hour of the same in another order", 1, "ip4/203.0.113.7", "ip6/2001:db8::7")
		dns.set("relay.example.org", "203.0.113.8")
		time.Sleep(nameRefresh)
		want("after a change", 2, "ip4/203.0.113.8")
		dns.fail("relay.example.org")
		time.Sleep(24 * time.Hour)
		want("after a day without DNS", 2, "ip4/203.0.113.8")
		dns.set("relay.example.org", "203.0.113.8")
		time.Sleep(nameRefresh)
		want("when DNS is back", 2, "ip4/203.0.113.8")
		if failed, found := strings.Count(log.String(), "name not resolved"), strings.Count(log.String(), "name resolved"); failed != 2 || found != 3 {
			t.Errorf("the log has %d failures and %d answers, want 2 and 3:\n%s", failed, found, log)
		}
	})
}

// Clients are not given addresses that none of them can reach. Debian, for one,
// gives a machine's own name the address 127.0.1.1.
func TestNamesLeadToUsableAddressesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			addr   string
			leadTo []string
			want   string // joined by spaces
			says   string // what the log must say if want is empty
		}{
			{"/dns/a.example/udp/1/quic-v1", []string{"127.0.1.1", "203.0.113.7"}, "/ip4/203.0.113.7/udp/1/quic-v1", ""},
			{"/dns/a.example/udp/1/quic-v1", []string{"127.0.1.1"}, "", "127.0.1.1"},
			{"/dns/a.example/udp/1/quic-v1", []string{"0.0.0.0", "::", "fe80::1", "224.0.0.1", "169.254.1.1"}, "", "169.254.1.1"},
			{"/dns/a.example/udp/1/quic-v1", []string{"192.168.1.10"}, "/ip4/192.168.1.10/udp/1/quic-v1", ""},
			{"/dns/a.example/udp/1/quic-v1", nil, "", "no address"},
			{"/dns4/a.example/udp/1/quic-v1", []string{"2001:db8::1", "203.0.113.7"}, "/ip4/203.0.113.7/udp/1/quic-v1", ""},
			{"/dns6/a.example/udp/1/quic-v1", []string{"2001:db8::1", "203.0.113.7"}, "/ip6/2001:db8::1/udp/1/quic-v1", ""},
			{"/dns6/a.example/udp/1/quic-v1", []string{"203.0.113.7"}, "", "no address"},
			{"/dns/localhost/udp/1/quic-v1", []string{"127.0.0.1"}, "/ip4/127.0.0.1/udp/1/quic-v1", ""},
			{"/dnsaddr/a.example/udp/1/quic-v1", nil, "/ip4/203.0.113.9/udp/1/quic-v1", ""},
		} {
			addr := ma.StringCast(tt.addr)
			dns, log := &fakeDNS{txt: []string{"dnsaddr=/ip4/203.0.113.9/udp/1/quic-v1", "dnsaddr=/ip4/203.0.113.9/tcp/1"}}, new(logBuffer)
			dns.set(addr[0].Value(), tt.leadTo...)
			n := newNames(dns, slog.New(slog.NewTextHandler(log, nil)))
			n.add(addr)
			n.follow(func() {})
			told := n.withIPs([]ma.Multiaddr{addr})
			n.close()
			if got := strings.Join(strs(told[:len(told)-1]), " "); got != tt.want || !told[len(told)-1].Equal(addr) {
				t.Errorf("%s with %v: clients get %v, want %q and the name", tt.addr, tt.leadTo, told, tt.want)
			}
			if line := log.line("name not resolved"); !strings.Contains(line, tt.says) || tt.says == "" && line != "" {
				t.Errorf("%s with %v: log line %q, want one that says %q", tt.addr, tt.leadTo, line, tt.says)
			}
		}
	})
}

// dnsServer serves fakeDNS on loopback, and returns a resolver that asks it.
func dnsServer(t *testing.T, dns *fakeDNS) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() { // ends when conn is closed
		packet := make([]byte, 512)
		for {
			size, from, err := conn.ReadFrom(packet)
			if err != nil {
				return
			}
			conn.WriteTo(dns.answer(packet[:size]), from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp4", conn.LocalAddr().String())
	}}
}

// answer returns the answer to a query of one question (RFC 1035, 4).
func (d *fakeDNS) answer(query []byte) []byte {
	name, at := "", 12
	for query[at] != 0 {
		name += string(query[at+1:][:query[at]]) + "."
		at += 1 + int(query[at])
	}
	question := query[12 : at+5]
	kind := binary.BigEndian.Uint16(query[at+1:])
	ips, err := d.find(strings.TrimSuffix(name, "."))
	var answers []byte
	count := 0
	for _, s := range ips {
		ip := netip.MustParseAddr(s)
		if want := uint16(28); ip.Is4() { // AAAA
			want = 1 // A
			if kind != want {
				continue
			}
		} else if kind != want {
			continue
		}
		answers = append(answers, 0xc0, 12) // refers to the question's name
		answers = binary.BigEndian.AppendUint16(answers, kind)
		answers = append(answers, 0, 1, 0, 0, 0, 60)
		answers = binary.BigEndian.AppendUint16(answers, uint16(ip.BitLen()/8))
		answers = append(answers, ip.AsSlice()...)
		count++
	}
	rcode := byte(0)
	if err != nil {
		rcode = 2 // SERVFAIL
	}
	header := append(slices.Clone(query[:2]), 0x81, 0x80|rcode, 0, 1, 0, byte(count), 0, 0, 0, 0)
	return slices.Concat(header, question, answers)
}

// The deployed client cannot dial a name, and ignores it without a word. Wherever
// the relay gives its addresses, IP addresses come first, even when DNS comes late.
func TestAnnouncedNameIsToldAsAddresses(t *testing.T) {
	dns := &fakeDNS{} // DNS is not up yet
	cfg := defaultConfig(t, "--announce=relay.example.org")
	cfg.testOnlyResolver = dnsServer(t, dns)
	r := newTestRelay(t, cfg)
	early := newClient(t)
	connect(t, early, r)

	port := listenPort(r.relay)
	dns.set("relay.example.org", "203.0.113.7", "2001:db8::7")
	want := []string{"/ip4/203.0.113.7/udp/" + port + "/quic-v1", "/ip6/2001:db8::7/udp/" + port + "/quic-v1", "/dns/relay.example.org/udp/" + port + "/quic-v1"}
	eventually(t, "clients that were connected before get the address", func() bool {
		told := strs(early.Peerstore().Addrs(r.info.ID))
		return slices.Contains(told, want[0]) && slices.Contains(told, want[1]) && slices.Contains(told, want[2])
	})

	if got := r.reachableAddrs(); !slices.Equal(got, want) {
		t.Errorf("the banner has %v, want %v", got, want)
	}
	if got := r.listedAddrs(); !slices.Equal(got[:len(want)], want) || !strings.Contains(got[len(want)], "/ip4/0.0.0.0/") {
		t.Errorf("the identity endpoint lists %v, want %v first", got, want)
	}
	said, _ := identifyOf(t, r)
	var listen []string
	for _, b := range said.ListenAddrs {
		listen = append(listen, ma.Cast(b).String())
	}
	if !slices.Equal(listen, want) {
		t.Errorf("identify says %v, want %v", listen, want)
	}
	got, err := circuitclient.Reserve(testContext(t), early, r.info)
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i] += "/p2p/" + r.peerID()
	}
	if !slices.Equal(strs(got.Addrs), want) {
		t.Errorf("the reservation has %v, want %v", got.Addrs, want)
	}
}

// We also send clients to other relays, so the same holds for their names.
func TestOtherRelaysNameIsToldAsAddress(t *testing.T) {
	there := newTestRelay(t, defaultConfig(t))
	port := listenPort(there.relay)
	cfg := defaultConfig(t, fmt.Sprintf("--bootstrap=/dns/other.example.org/udp/%s/quic-v1/p2p/%s", port, there.info.ID))
	dns := &fakeDNS{}
	dns.set("other.example.org", "192.0.2.7")
	cfg.testOnlyResolver = dnsServer(t, dns)
	here := newTestRelay(t, cfg)
	told := strs(here.host.Peerstore().Addrs(there.info.ID))
	want := []string{"/ip4/192.0.2.7/udp/" + port + "/quic-v1", "/dns/other.example.org/udp/" + port + "/quic-v1"}
	if !slices.Equal(told, want) {
		t.Errorf("clients get %v, want %v", told, want)
	}
}

// Relays that name each other by DNS names find each other again while DNS hangs.
func TestRelayIsDialledWhileDNSHangs(t *testing.T) {
	own := ownAddr(t) // a name never leads to loopback
	dns, hangs, ended := &fakeDNS{}, new(atomic.Bool), make(chan struct{})
	t.Cleanup(func() { close(ended) })
	dns.set("other.example.org", own.String())
	server := dnsServer(t, dns)
	planned := planRelays(t, 1)[0]
	there := planned.start(t)
	cfg := defaultConfig(t, fmt.Sprintf("--bootstrap=/dns/other.example.org/udp/%d/quic-v1/p2p/%s", planned.port, there.info.ID))
	cfg.testOnlyResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		if hangs.Load() {
			<-ended
		}
		return server.Dial(ctx, network, addr)
	}}
	here := newTestRelay(t, cfg)
	here.waitConnected(t, there.info.ID)
	hangs.Store(true)
	there.close()
	eventually(t, "the other relay has left", func() bool { _, connected := here.federation.counts(); return connected == 0 })
	there = planned.start(t)
	here.waitConnected(t, there.info.ID)
}

// ownAddr returns an address of this machine that is not loopback.
func ownAddr(t *testing.T) netip.Addr {
	t.Helper()
	ips, err := new(interfaces).read()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range ips {
		if ip := ipOf(a); ip.Is4() && isReachable(ip) {
			return ip
		}
	}
	t.Skip("this machine has loopback addresses alone")
	return netip.Addr{}
}

// However many addresses the names resolve to, a reservation fits into the 4096
// bytes that clients read.
func TestReservationWithManyNamesFits(t *testing.T) {
	label := strings.Repeat("a", 60)
	dns := &fakeDNS{}
	var args []string
	for i := range maxAnnounce {
		name := fmt.Sprintf("%d.%s.%s.%s.%s.org", i, label, label, label, label)
		args = append(args, "--announce="+name)
		var ips []string
		for j := range 20 {
			ips = append(ips, fmt.Sprintf("2001:db8::%d:%d", i+1, j+1))
		}
		dns.set(name, ips...)
	}
	cfg := defaultConfig(t, args...)
	cfg.testOnlyResolver = dnsServer(t, dns)
	r := newTestRelay(t, cfg)
	c := newClient(t)
	connect(t, c, r)
	got, err := circuitclient.Reserve(testContext(t), c, r.info)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Addrs) != maxOfferedAddrs+maxAnnounce {
		t.Errorf("%d addresses in the reservation, want %d IP addresses and %d names", len(got.Addrs), maxOfferedAddrs, maxAnnounce)
	}
}
