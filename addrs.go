package main

// What an address may be: what an operator announces, what a client may claim to
// listen on, and what others are told of it.

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// What an address may be: what an operator announces, what a client may claim to
// listen on, and what others are told of it.

// parseBootstrap reads the address of another relay: a QUIC multiaddr that ends
// in its ID.
func parseBootstrap(s string) (peer.AddrInfo, error) {
	addr, err := parseAnnounce(s, 0)
	if err != nil {
		return peer.AddrInfo{}, err
	}
	transport, id := peer.SplitAddr(addr)
	if id == "" {
		return peer.AddrInfo{}, errors.New("no peer ID, write /ip4/203.0.113.7/udp/4001/quic-v1/p2p/12D3KooW…")
	}
	return peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{transport}}, nil
}

// within puts the addresses of conns, the newest first, and listen together, as
// many as an answer has room for.
func within(conns []network.Conn, listen []ma.Multiaddr) []ma.Multiaddr {
	addrs := make([]ma.Multiaddr, 0, maxAddrsPerPeer)
	size := 0
	add := func(a ma.Multiaddr) {
		const framing = 3 // field tag and length of a protobuf entry
		if len(addrs) == maxAddrsPerPeer || size+len(a.Bytes())+framing > maxAddrBytesPerPeer || slices.ContainsFunc(addrs, a.Equal) {
			return
		}
		addrs = append(addrs, a)
		size += len(a.Bytes()) + framing
	}
	// The newest connection is the likeliest to be alive. connsPerPeer observed
	// addresses, of 23 bytes at most, always fit.
	for _, c := range slices.Backward(conns) {
		add(c.RemoteMultiaddr())
	}
	for _, a := range listen {
		add(a)
	}
	return addrs
}

// usableAddrs picks what id's mates may be told of the listen addresses it
// reported over a connection from remote: a circuit through a relay first, then
// public addresses, then private ones, which mates in the same home use. Others
// are dropped: loopback (unless it came over loopback), unspecified, too long,
// and those that name another peer.
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
	return slices.Clone(usable[:min(len(usable), maxAddrsPerPeer)]) // not the array with all of them
}

// reachedAddr is the address at which a client says that it reaches this relay, if
// it can be dialled: said is what it told at observed_addr of a connection from
// remote. Else it is nil.
func reachedAddr(said, remote ma.Multiaddr) ma.Multiaddr {
	if len(said) == 0 || len(said) > maxAddrComponents {
		return nil
	}
	if _, last := ma.SplitLast(said); last != nil && last.Protocol().Code == ma.P_P2P {
		said, _ = peer.SplitAddr(said)
	}
	if len(said) != 3 || !manet.IsThinWaist(said) || said[1].Protocol().Code != ma.P_UDP || said[2].Protocol().Code != ma.P_QUIC_V1 {
		return nil
	}
	ip, err := manet.ToIP(said)
	if err != nil || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLoopback() && !manet.IsIPLoopback(remote) || said[1].Value() == "0" {
		return nil
	}
	return said
}

func isDNS(a ma.Multiaddr) bool {
	switch a[0].Protocol().Code {
	case ma.P_DNS, ma.P_DNS4, ma.P_DNS6, ma.P_DNSADDR:
		return true
	}
	return false
}

func strs(addrs []ma.Multiaddr) []string {
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return out
}

// announcedAddrs are the addresses that the operator announces, for a relay on
// port with key; its ID may end them.
func announcedAddrs(announce []string, port int, key crypto.PrivKey) ([]ma.Multiaddr, error) {
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
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

// dnsName is a host name: letters, digits and hyphens between dots (RFC 1123).
var dnsName = regexp.MustCompile(`^([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.?$`)

// parseAnnounce reads an address that clients can reach: an IP address or a DNS
// name, at which UDP port is ours, or a full QUIC multiaddr, which may name
// another port and end in /p2p and our ID.
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
		return nil, errors.New(example)
	}
	addr, err := ma.NewMultiaddr(text)
	if err != nil {
		return nil, fmt.Errorf("%w; %s", err, example)
	}
	transport, _ := peer.SplitAddr(addr)
	if len(transport) != 3 || !(manet.IsThinWaist(transport) || isDNS(transport)) ||
		transport[1].Protocol().Code != ma.P_UDP || transport[2].Protocol().Code != ma.P_QUIC_V1 {
		return nil, fmt.Errorf("not a QUIC address; %s", example)
	}
	if ip, err := manet.ToIP(transport); err == nil && (ip.IsUnspecified() || ip.IsMulticast()) {
		return nil, errors.New("not an address that a client can reach")
	}
	if len(transport.Bytes()) > 260 {
		return nil, errors.New("longer than a DNS name can be")
	}
	return addr, nil
}
