package main

// The middle steps of `check`: which addresses the relay has, and whether it
// answers at each by QUIC.

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const (
	// maxCheckDials is how many addresses are dialled.
	maxCheckDials = 8

	// checkPort is the relay's UDP port if nothing says another.
	checkPort = 4001
)

// dialCheck shakes hands with the relay at each of its addresses.
type dialCheck struct {
	endpoint *endpointCheck

	dials []dialled
	used  *dialled // the address over which the rest is checked; nil if none answers
	id    peer.ID  // the relay's: promised, or else that of used
}

// dialled is an address of the relay and what came of it.
type dialled struct {
	addr      ma.Multiaddr
	family    family
	announced bool   // by the operator, rather than the host that was asked
	notTried  string // why it was not dialled; empty if it was
	useless   bool   // not dialled, and clients can't dial it either

	client *checkClient // the one that has dialled, closed unless this is used
	err    error        // why there is none
	took   time.Duration
}

// dial dials all addresses at once, each with a client of its own, and chooses the one
// to use.
func (c *dialCheck) dial(ctx context.Context) {
	naming, cancel := context.WithTimeout(ctx, checkAskTime)
	defer cancel()
	c.id, c.dials = c.endpoint.id, c.addrs(naming)
	ctx, cancel = context.WithTimeout(ctx, checkDialTime)
	defer cancel()
	var dialling sync.WaitGroup
	for i := range c.dials {
		if d := &c.dials[i]; d.notTried == "" {
			dialling.Go(func() {
				begun := time.Now()
				d.client, d.err = dialCheckClient(ctx, d.addr, c.endpoint.id)
				d.took = time.Since(begun)
			})
		}
	}
	dialling.Wait()
	for _, f := range []family{ipv4, ipv6} {
		if best := c.best(f); c.used == nil && best != nil && best.client != nil {
			c.used, c.id = best, best.client.relay
		}
	}
	for i := range c.dials {
		if d := &c.dials[i]; d.client != nil && d != c.used {
			d.client.Close()
		}
	}
}

// best is an address of f that was dialled: one that works if there is one, and
// nil if none was dialled.
func (c *dialCheck) best(f family) (best *dialled) {
	for i, d := range c.dials {
		if d.family == f && d.notTried == "" && (best == nil || best.client == nil && d.client != nil) {
			best = &c.dials[i]
		}
	}
	return best
}

// over says whether the relay answers over f.
func (c *dialCheck) over(f family) checkStep {
	best := c.best(f)
	if best == nil {
		if s, missing := c.endpoint.host.missing(f); missing {
			return s
		}
		return stepSkipped("the relay lists no %v address", f)
	}
	s := stepPassed("%s answers with the promised peer ID", best.addr)
	switch {
	case best.client == nil && c.elsewhere(*best):
		return stepSkipped("%s: %s, and others are announced", best.addr, errText(best.err))
	case best.client == nil:
		s = stepFailed(c.whyNoQUIC(best), "%s: %s", best.addr, errText(best.err))
	case best.client.relay != c.id: // nothing was promised, and the other family's is another
		s = stepFailed(likely("the name's addresses belong to two different relays", "getent ahosts "+c.endpoint.host.host), "%s is %s, not %s", best.addr, best.client.relay, c.id)
	case c.endpoint.id == "":
		s = stepPassed("%s is %s, which nothing promised", best.addr, c.id)
	}
	s.Millis = millis(best.took)
	return s.with(map[string]any{"address": best.addr.String()})
}

// elsewhere reports whether the operator says that the relay is elsewhere than at d:
// the endpoint that was asked may be behind a proxy.
func (c *dialCheck) elsewhere(d dialled) bool {
	return !d.announced && slices.ContainsFunc(c.dials, func(o dialled) bool { return o.announced })
}

// addresses sums up what came of each address that the endpoint lists.
func (c *dialCheck) addresses(context.Context) (s checkStep) {
	if c.used == nil {
		defer func() { s = s.blocking("needs QUIC") }()
	}
	listed := len(c.endpoint.listed)
	if c.endpoint.listed == nil {
		return stepSkipped("the identity endpoint lists them")
	}
	var lines []string
	bad, good := 0, 0
	for _, d := range c.dials {
		mark, says := "–", d.notTried
		switch {
		case d.client != nil:
			mark, says = "✓", fmt.Sprintf("%.0f ms", millis(d.took))
			good++
		case d.notTried == "" && c.elsewhere(d):
			says = errText(d.err) + ", and others are announced"
		case d.notTried == "":
			mark, says = "✗", errText(d.err)
			bad++
		case d.useless:
			mark = "✗"
			bad++
		}
		lines = append(lines, clean(fmt.Sprintf("%s %s  %s", mark, d.addr, says)))
	}
	detail := fmt.Sprintf("%d listed, %d answer", listed, good)
	s = stepPassed("%s", detail)
	switch {
	case bad > 0:
		s = stepFailed(likely("clients are told addresses at which the relay does not answer: see --announce, and the firewall for that family"), "%s", detail)
	case good == 0:
		s = stepFailed(likely("none of them is a QUIC address that can be dialled from here"), "%s", detail)
	}
	s.Lines = lines
	return s.with(map[string]any{"listed": listed, "answer": good, "fail": bad})
}

// whyFull says why a relay refuses a connection.
func whyFull() diagnosis {
	return likely("the relay is at its limit of clients, or of clients from this address: see --max-clients and --max-clients-per-ip", "journalctl -u privstack-relay --since -1h")
}

func (c *dialCheck) whyNoQUIC(d *dialled) diagnosis {
	port, _ := d.addr.ValueForProtocol(ma.P_UDP)
	runs := c.endpoint.listed != nil || c.endpoint.host.url == nil // as far as we know
	switch {
	case errors.As(d.err, new(sec.ErrPeerIDMismatch)):
		return likely("another relay, or one with another key file, answers on UDP "+port+": clients will refuse it", "ss -lunp 'sport = :"+port+"'")
	case isRefusal(d.err):
		return whyFull()
	case isTimeout(d.err) && runs:
		return likely("UDP "+port+" is closed over "+string(d.family)+" in the firewall of the machine or of its provider", "ufw allow "+port+"/udp", "systemctl status privstack-relay")
	case isTimeout(d.err):
		return likely("the relay is not running, or UDP "+port+" is closed in a firewall", "systemctl status privstack-relay", "ufw allow "+port+"/udp")
	}
	return likely("something else than a relay answers on UDP "+port, "ss -lunp 'sport = :"+port+"'")
}

// addrs returns the relay's addresses as clients find them: those that the endpoint
// lists, with the host that was asked in the place of 0.0.0.0 and ::. None is there
// twice, and at most maxCheckDials are to be dialled.
func (c *dialCheck) addrs(ctx context.Context) (dials []dialled) {
	host := c.endpoint.host
	all := slices.Concat(host.ips[ipv4], host.ips[ipv6])
	var found []dialled
	switch listed := c.endpoint.listed; {
	case host.addr != nil:
		found = c.atIPs(all, host.addr[1:], false)
	case listed == nil: // the endpoint did not answer
		found = c.atIPs(all, ma.StringCast(fmt.Sprintf("/udp/%d/quic-v1", checkPort)), false)
	default:
		for _, s := range listed {
			found = append(found, c.atListed(ctx, s)...)
		}
	}
	left := maxCheckDials
	for _, d := range found {
		if slices.ContainsFunc(dials, func(o dialled) bool { return o.addr.Equal(d.addr) }) {
			continue
		}
		if d.notTried == "" && left == 0 {
			d.notTried = "not dialled, there are too many"
		} else if d.notTried == "" {
			left--
		}
		dials = append(dials, d)
	}
	return dials
}

// atListed returns the addresses that s, in the endpoint's list, stands for. It
// skips what is no QUIC address: other relays may have other transports.
func (c *dialCheck) atListed(ctx context.Context, s string) []dialled {
	addr, err := ma.NewMultiaddr(s)
	if err == nil {
		addr, _ = peer.SplitAddr(addr)
	}
	if err != nil || !isQUICAddr(addr) {
		return nil
	}
	host, ip := c.endpoint.host, ipOf(addr)
	switch {
	case !ip.IsValid(): // a name
		ips, _ := lookupIPs(ctx, addr[0].Protocol().Code, addr[0].Value())
		if len(ips) == 0 {
			return []dialled{{addr: addr, announced: true, notTried: "the name has no address", useless: true}}
		}
		return c.atIPs(ips[:min(len(ips), 2*maxCheckIPs)], addr[1:], true)
	case ip.IsUnspecified():
		f := familyOf(ip)
		if len(host.ips[f]) == 0 {
			return []dialled{{addr: addr, family: f, notTried: fmt.Sprintf("%s has no %v address", host.host, f)}}
		}
		return c.atIPs(host.ips[f], addr[1:], false)
	}
	return c.atIPs([]netip.Addr{ip}, addr[1:], true)
}

// atIPs returns the addresses that begin with each of ips and end in rest.
func (c *dialCheck) atIPs(ips []netip.Addr, rest ma.Multiaddr, announced bool) (found []dialled) {
	for _, ip := range ips {
		d := dialled{addr: ipAddr(ip).Encapsulate(rest), family: familyOf(ip), announced: announced}
		switch {
		case announced && c.isForeign(ip):
			// Nor is it our business to dial what is local to us.
			d.notTried, d.useless = "a private address, which only its own network can dial", true
		case routeTo(ip) != nil:
			d.notTried = fmt.Sprintf("this machine has no %v", d.family)
		}
		found = append(found, d)
	}
	return found
}

// isForeign reports whether ip is local to a network that the host which was asked
// is not in.
func (c *dialCheck) isForeign(ip netip.Addr) bool {
	host := slices.Concat(c.endpoint.host.ips[ipv4], c.endpoint.host.ips[ipv6])
	if slices.ContainsFunc(host, netip.Addr.IsLoopback) {
		return false
	}
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return ip.IsLoopback() || ip.IsMulticast() || ip == broadcast || isPrivate(ip) && !slices.ContainsFunc(host, isPrivate)
}

// isPrivate reports whether ip means something in one network alone.
func isPrivate(ip netip.Addr) bool { return manet.IsPrivateAddr(ipAddr(ip)) }

func ipAddr(ip netip.Addr) ma.Multiaddr {
	addr, _ := manet.FromIP(ip.AsSlice()) // which fails for other lengths than an Addr has
	return addr
}
