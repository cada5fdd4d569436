package main

// What an address may be: what an operator may announce, what a client may claim
// to listen on, which of our own addresses we advertise, and how many addresses fit
// into an answer.

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// dnsName is a host name: letters, digits and hyphens between dots (RFC 1123).
var dnsName = regexp.MustCompile(`^([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.?$`)

// parseAnnounce reads an address at which clients can reach a relay: an IP address
// or a DNS name, where the UDP port is port, or a whole QUIC multiaddr, which may
// have another port and may end in /p2p and the relay's ID.
func parseAnnounce(s string, port int) (ma.Multiaddr, error) {
	const example = "write an IP address, a DNS name, or a multiaddr such as /ip4/203.0.113.7/udp/4001/quic-v1"
	text := s
	if ip, err := netip.ParseAddr(s); err == nil {
		if ip.Zone() != "" {
			return nil, errors.New("an address with a zone means nothing on another machine")
		}
		ip = ip.Unmap()
		family := "ip6"
		if ip.Is4() {
			family = "ip4"
		}
		text = fmt.Sprintf("/%s/%s/udp/%d/quic-v1", family, ip, port)
	} else if len(s) <= 253 && dnsName.MatchString(s) {
		text = fmt.Sprintf("/dns/%s/udp/%d/quic-v1", strings.TrimSuffix(s, "."), port)
	} else if !strings.HasPrefix(s, "/") {
		return nil, errors.New(cmp.Or(addrMistake(s), example))
	}
	addr, err := ma.NewMultiaddr(text)
	if err != nil {
		return nil, fmt.Errorf("not a multiaddr; %s", example) // libp2p's reason is about bytes
	}
	transport, _ := peer.SplitAddr(addr)
	if !isQUICAddr(transport) {
		return nil, fmt.Errorf("not a QUIC address; %s", example)
	}
	if ip, err := manet.ToIP(transport); err == nil && (ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() && ip.To4() == nil) {
		return nil, errors.New("not an address that a client can reach")
	}
	if transport[1].Value() == "0" {
		return nil, errors.New("port 0 is no port that a client can reach")
	}
	if len(transport.Bytes()) > 260 {
		return nil, errors.New("longer than a DNS name can be")
	}
	return addr, nil
}

// addrMistake says what is wrong with s, which is neither an IP address, a DNS name nor a
// multiaddr. It knows the usual mistakes, and returns "" for others.
func addrMistake(s string) string {
	if _, after, isURL := strings.Cut(s, "://"); isURL {
		host, _, _ := strings.Cut(after, "/")
		return "a URL; write the host alone, such as " + cmp.Or(host, "relay.example.org")
	}
	if strings.ContainsAny(s, ", ") {
		return "write one address, and give the flag again for each of the others"
	}
	if host, port, err := net.SplitHostPort(s); err == nil {
		if number, err := strconv.ParseUint(port, 10, 16); err == nil {
			if addr, err := parseAnnounce(host, int(number)); err == nil {
				return fmt.Sprintf("leave the port out, or write %s", addr)
			}
		}
	}
	if inner, ok := strings.CutPrefix(s, "["); ok && strings.HasSuffix(inner, "]") {
		return "write the address without brackets"
	}
	return ""
}

// parseBootstrap reads the address of another relay: as parseAnnounce does, but
// the address must end in that relay's ID.
func parseBootstrap(s string) (peer.AddrInfo, error) {
	const example = "write what the other relay's banner shows after Bootstrap:, such as /ip4/203.0.113.7/udp/4001/quic-v1/p2p/12D3KooW…"
	addr, err := parseAnnounce(s, 1) // any port: without a multiaddr there is no ID
	transport, id := peer.SplitAddr(addr)
	switch {
	case err != nil:
		return peer.AddrInfo{}, errors.New("not the address of a relay; " + example)
	case id == "":
		return peer.AddrInfo{}, errors.New("no peer ID; " + example)
	}
	return peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{transport}}, nil
}

// announcedAddrs returns the addresses in announce, which parseAnnounce accepts,
// for the relay self on UDP port. Its own ID may end them, another's may not.
func announcedAddrs(announce []string, port int, self peer.ID) ([]ma.Multiaddr, error) {
	var addrs []ma.Multiaddr
	for _, s := range announce {
		addr, err := parseAnnounce(s, port)
		if err != nil {
			return nil, fmt.Errorf("announce %s: %w", s, err)
		}
		addr, id := peer.SplitAddr(addr)
		if id != "" && id != self {
			return nil, fmt.Errorf("announce %s: this relay is %s", s, self)
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// doubtfulAnnounced returns the likely mistakes in announce, which parseAnnounce accepts:
// addresses at which this machine reaches only itself, and those given more than once.
func doubtfulAnnounced(announce []string) (loopback, twice []string) {
	seen := make(map[string]int)
	for _, s := range announce {
		addr, err := parseAnnounce(s, 1)
		if err != nil {
			continue
		}
		addr, _ = peer.SplitAddr(addr)
		if manet.IsIPLoopback(addr) || isDNS(addr) && strings.EqualFold(addr[0].Value(), "localhost") {
			loopback = append(loopback, s)
		}
		text := strings.ToLower(addr.String())
		seen[text]++
		if seen[text] == 2 {
			twice = append(twice, s)
		}
	}
	return loopback, twice
}

// maskOf returns the address that clients at from share if it is private, or the zero Addr.
// One client alone shows nothing. Loopback is no mask: the operator connects from there.
func maskOf(from []netip.Addr) (mask netip.Addr) {
	if len(from) < 2 || !from[0].IsPrivate() || slices.ContainsFunc(from, func(a netip.Addr) bool { return a != from[0] }) {
		return netip.Addr{}
	}
	return from[0]
}

// bestAddrs returns those of the machine's addresses that are worth advertising:
// public ones first, then private ones, and loopback only if there is nothing
// else. It is empty only if addrs is.
func bestAddrs(addrs []ma.Multiaddr) []ma.Multiaddr {
	var public, private, loopback []ma.Multiaddr
	for _, a := range addrs {
		switch {
		case manet.IsIPLoopback(a):
			loopback = append(loopback, a)
		case manet.IsPublicAddr(a):
			public = append(public, a)
		case !manet.IsIP6LinkLocal(a): // which means nothing on another link
			private = append(private, a)
		}
	}
	offered := append(public, private...)
	if len(offered) == 0 {
		offered = loopback
	}
	return offered[:min(len(offered), maxOfferedAddrs)]
}

// usableAddrs returns those of id's reported listen addresses that we may tell its mates:
// circuits through a relay first, then public addresses, then private ones, which mates
// in the same home use. It drops unspecified and overlong addresses, those that name
// another peer, and loopback unless remote, from where id reported them, is loopback too.
func usableAddrs(id peer.ID, reported []ma.Multiaddr, remote ma.Multiaddr) []ma.Multiaddr {
	rank := func(a ma.Multiaddr) int {
		_, relayErr := a.ValueForProtocol(ma.P_CIRCUIT)
		switch {
		case relayErr == nil:
			return 0
		case manet.IsPublicAddr(a):
			return 1
		}
		return 2
	}
	var usable []ma.Multiaddr
	for _, a := range reported {
		// A component takes two bytes on the wire and many times as much here.
		if len(a) == 0 || len(a) > maxAddrComponents || len(a.Bytes()) > maxAddrBytesPerPeer {
			continue
		}
		if _, last := ma.SplitLast(a); last != nil && last.Protocol().Code == ma.P_P2P {
			if a, _ = peer.SplitAddr(a); len(a) == 0 || last.Value() != id.String() {
				continue
			}
		}
		if !manet.IsThinWaist(a) && !isDNS(a) || manet.IsIPUnspecified(a) || manet.IsIPLoopback(a) && !manet.IsIPLoopback(remote) {
			continue
		}
		usable = append(usable, a)
	}
	slices.SortStableFunc(usable, func(a, b ma.Multiaddr) int { return cmp.Compare(rank(a), rank(b)) })
	return slices.Clone(usable[:min(len(usable), maxAddrsPerPeer)]) // let go of the array behind all of them
}

// fitAddrs returns the addresses of all lists in order, each once, as many as an answer
// has room for. The observed addresses of a peer always fit: there are connsPerPeer at
// most, of up to 23 bytes each.
func fitAddrs(lists ...[]ma.Multiaddr) []ma.Multiaddr {
	addrs := make([]ma.Multiaddr, 0, maxAddrsPerPeer)
	size := 0
	for _, list := range lists {
		for _, a := range list {
			const framing = 3 // field tag and length of a protobuf entry
			if len(addrs) == maxAddrsPerPeer || size+len(a.Bytes())+framing > maxAddrBytesPerPeer || slices.ContainsFunc(addrs, a.Equal) {
				continue
			}
			addrs = append(addrs, a)
			size += len(a.Bytes()) + framing
		}
	}
	return addrs
}

// reachedAddr returns the address at which a client reaches this relay, as the client
// says at observed_addr of a connection from remote, or nil if nobody could dial it.
func reachedAddr(said, remote ma.Multiaddr) ma.Multiaddr {
	if len(said) > maxAddrComponents {
		return nil
	}
	if _, last := ma.SplitLast(said); last != nil && last.Protocol().Code == ma.P_P2P {
		said, _ = peer.SplitAddr(said)
	}
	if !isQUICAddr(said) || isDNS(said) || said[1].Value() == "0" {
		return nil
	}
	ip := ipOf(said)
	if ip.IsUnspecified() || ip.IsMulticast() || ip.IsLoopback() && !manet.IsIPLoopback(remote) {
		return nil
	}
	return said
}

// isQUICAddr reports whether a is an IP address or DNS name, a UDP port and QUIC
// v1, and nothing more.
func isQUICAddr(a ma.Multiaddr) bool {
	return len(a) == 3 && (manet.IsThinWaist(a) || isDNS(a)) &&
		a[1].Protocol().Code == ma.P_UDP && a[2].Protocol().Code == ma.P_QUIC_V1
}

// isDNS reports whether a, which is not empty, begins with a DNS name.
func isDNS(a ma.Multiaddr) bool {
	switch a[0].Protocol().Code {
	case ma.P_DNS, ma.P_DNS4, ma.P_DNS6, ma.P_DNSADDR:
		return true
	}
	return false
}

// ipOf returns the IP address that a begins with, or the zero Addr.
func ipOf(a ma.Multiaddr) netip.Addr {
	ip, err := manet.ToIP(a)
	if err != nil {
		return netip.Addr{}
	}
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}

// addrPort returns the UDP address addr, where IPv4 is never mapped into IPv6. It is not
// valid if addr is something else.
func addrPort(addr net.Addr) netip.AddrPort {
	u, ok := addr.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := u.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// sameLAN reports whether devices seen at a and b are likely to be in one home:
// they share an IPv4 address, which is their NAT's, or an IPv6 /64, which is one
// link (RFC 7421).
func sameLAN(a, b netip.Addr) bool {
	bits := 64
	if a.Is4() {
		bits = 32
	}
	lan, err := a.Prefix(bits)
	return err == nil && lan.Contains(b)
}

// strs returns addrs as strings.
func strs(addrs []ma.Multiaddr) []string {
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return out
}
