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
	maxCheckDials = 8    // addresses that are dialled
	checkPort     = 4001 // the relay's UDP port if nothing says another
)

// dialCheck shakes hands with the relay at each of its addresses.
type dialCheck struct {
	endpoint *endpointCheck
	dials    []dialled
	used     *dialled // the address over which the rest is checked; nil if none answers
	relayID  peer.ID  // the promised one, or else that of used
}

// dialled is an address of the relay and what came of it.
type dialled struct {
	addr      ma.Multiaddr // nil for one that is only named in the report
	name      string       // stands for addr if that is nil
	family    string
	announced bool   // by the operator, rather than the host that was asked
	result    string // as a step has it; "" if it is yet to be dialled
	says      string // the reason, or how long it took
	took      time.Duration
	client    *checkClient // nil if it was not dialled, or failed; closed unless it is used
	err       error        // nil if it was not dialled, or works
}

// dial dials all addresses at once, each with its own client, and chooses one to use.
func (c *dialCheck) dial(ctx context.Context) {
	naming, cancel := context.WithTimeout(ctx, checkAskTime)
	defer cancel()
	c.relayID, c.dials = c.endpoint.relayID, c.addrs(naming)
	ctx, cancel = context.WithTimeout(ctx, checkDialTime)
	defer cancel()
	var dialling sync.WaitGroup
	for i := range c.dials {
		if d := &c.dials[i]; d.result == "" {
			dialling.Go(func() {
				begun := time.Now()
				d.client, d.err = dialCheckClient(ctx, d.addr, c.endpoint.relayID)
				d.took = time.Since(begun)
			})
		}
	}
	dialling.Wait()
	for _, f := range []string{ipv4, ipv6} {
		if best := c.best(f); c.used == nil && best != nil && best.client != nil {
			c.used, c.relayID = best, best.client.relayID
		}
	}
	announced := slices.ContainsFunc(c.dials, func(d dialled) bool { return d.announced })
	for i := range c.dials {
		switch d := &c.dials[i]; {
		case d.client != nil:
			d.result, d.says = checkPassed, fmt.Sprintf("%.0f ms", millis(d.took))
			if d != c.used {
				d.client.close()
			}
		case d.err != nil && announced && !d.announced:
			// The endpoint that was asked may be behind a proxy.
			d.result, d.says = checkSkipped, errText(d.err)+"; the relay announces other addresses"
		case d.err != nil:
			d.result, d.says = checkFailed, errText(d.err)
		}
	}
}

// best returns an address of family f that was dialled, if possible one that works, or nil
// if none was dialled.
func (c *dialCheck) best(f string) (best *dialled) {
	for i, d := range c.dials {
		if d.family == f && (d.client != nil || d.err != nil) && (best == nil || best.client == nil && d.client != nil) {
			best = &c.dials[i]
		}
	}
	return best
}

// over says whether the relay answers over f.
func (c *dialCheck) over(f string) checkStep {
	best := c.best(f)
	switch {
	case best == nil && c.endpoint.lacks[f] != "":
		return stepSkipped("%s", c.endpoint.lacks[f])
	case best == nil:
		return stepSkipped("the relay lists no %s address", f)
	case best.result == checkSkipped:
		return stepSkipped("%s: %s", best.addr, best.says)
	}
	s := stepPassed("%s answers with the promised peer ID", best.addr)
	switch {
	case best.err != nil:
		s = stepFailed(c.whyNoQUIC(best), "%s: %s", best.addr, best.says)
	case best.client.relayID != c.relayID: // nothing was promised, and the other family's is another
		s = stepFailed(c.endpoint.whyTwoRelays(), "%s answers with peer ID %s, not %s", best.addr, best.client.relayID, c.relayID)
	case c.endpoint.relayID == "":
		s = stepPassed("%s answers with peer ID %s, which nothing confirms", best.addr, c.relayID)
	}
	s.Millis = millis(best.took)
	return s.with(map[string]any{"address": best.addr.String()})
}

// addresses sums up what came of each address that the endpoint lists.
func (c *dialCheck) addresses(context.Context) checkStep {
	blocks := ""
	if c.used == nil {
		blocks = "needs an address that answers"
	}
	if c.endpoint.listed == nil {
		return stepSkipped("needs the list of the identity endpoint").blocking(blocks)
	}
	var lines []string
	count := make(map[string]int)
	for _, d := range c.dials {
		count[d.result]++
		name := d.name
		if d.addr != nil {
			name = d.addr.String()
		}
		lines = append(lines, fmt.Sprintf("%s %s  %s", checkMarks[d.result], name, d.says))
	}
	listed, good, bad := len(c.endpoint.listed), count[checkPassed], count[checkFailed]
	s := stepPassed("%d listed, %d answer", listed, good)
	if bad > 0 {
		s = stepFailed(likely("the relay gives clients an address at which it does not answer: check --announce, and the firewall for IPv4 and IPv6"), "%s", s.Detail)
	} else if good == 0 {
		s = stepFailed(likely("this machine can dial none of them"), "%s", s.Detail)
	}
	s.Lines = lines
	return s.with(map[string]any{"listed": listed, "answer": good, "fail": bad}).blocking(blocks)
}

// whyFull says why a relay refuses a connection.
func whyFull() diagnosis {
	return likely("the relay has as many clients as it allows, in all or from this address: see --max-clients and --max-clients-per-ip", "journalctl -u privstack-relay --since -1h")
}

func (c *dialCheck) whyNoQUIC(d *dialled) diagnosis {
	port, _ := d.addr.ValueForProtocol(ma.P_UDP)
	runs := c.endpoint.listed != nil || c.endpoint.url == nil // as far as we know
	switch {
	case errors.As(d.err, new(sec.ErrPeerIDMismatch)):
		return likely("another relay answers on UDP "+port+", or this one has another key file: clients will refuse it", "ss -lunp 'sport = :"+port+"'")
	case isRefusal(d.err):
		return whyFull()
	case isTimeout(d.err) && runs:
		return likely("a firewall, on the machine or at its provider, blocks UDP "+port+" over "+d.family, append(tryOpen(port, "udp"), tryStatus)...)
	case isTimeout(d.err):
		return likely("the relay is not running, or a firewall blocks UDP "+port, append([]string{tryStatus}, tryOpen(port, "udp")...)...)
	}
	return likely("another program answers on UDP "+port, "ss -lunp 'sport = :"+port+"'")
}

// addrs returns the relay's addresses as clients find them, each once: those that the
// endpoint lists, where the host that was asked replaces 0.0.0.0 and ::.
func (c *dialCheck) addrs(ctx context.Context) (dials []dialled) {
	host := slices.Concat(c.endpoint.ips[ipv4], c.endpoint.ips[ipv6])
	var found []dialled
	switch {
	case c.endpoint.addr != nil:
		found = c.atIPs(host, c.endpoint.addr[1:], false)
	case c.endpoint.listed == nil: // the endpoint did not answer
		found = c.atIPs(host, ma.StringCast(fmt.Sprintf("/udp/%d/quic-v1", checkPort)), false)
	}
	// Each that is listed has a line in the report, whatever becomes of it.
	for _, s := range c.endpoint.listed {
		stands := c.atListed(ctx, s)
		if len(stands) == 0 {
			stands = []dialled{{name: s, result: checkSkipped, says: "not QUIC, which is all that clients speak"}}
		} else if fresh := slices.DeleteFunc(slices.Clone(stands), func(d dialled) bool { return isAmong(found, d) }); len(fresh) > 0 {
			stands = fresh
		} else if stands[0].addr.String() != s {
			stands = []dialled{{name: s, result: checkSkipped, says: "stands for " + stands[0].addr.String()}}
		} else {
			stands = []dialled{{name: s, result: checkSkipped, says: "listed twice"}}
		}
		found = append(found, stands...)
	}
	left := maxCheckDials
	for _, d := range found {
		if d.addr != nil && isAmong(dials, d) {
			continue
		}
		if d.result == "" && left == 0 {
			d.result, d.says = checkSkipped, fmt.Sprintf("not dialled: a check dials at most %d addresses", maxCheckDials)
		} else if d.result == "" {
			left--
		}
		dials = append(dials, d)
	}
	return dials
}

// isAmong reports whether one of dials has the address of d.
func isAmong(dials []dialled, d dialled) bool {
	return slices.ContainsFunc(dials, func(o dialled) bool { return o.addr != nil && o.addr.Equal(d.addr) })
}

// atListed returns the addresses for which s stands in the endpoint's list. There are none
// if s is not a QUIC address: other relays may have other transports.
func (c *dialCheck) atListed(ctx context.Context, s string) []dialled {
	addr, _ := ma.NewMultiaddr(s) // empty if it is none
	if addr, _ = peer.SplitAddr(addr); !isQUICAddr(addr) {
		return nil
	}
	ip := ipOf(addr)
	ips := []netip.Addr{ip}
	if ip.IsUnspecified() { // it stands for the host that was asked
		if ips = c.endpoint.ips[familyOf(ip)]; len(ips) == 0 {
			return []dialled{{addr: addr, result: checkSkipped, says: c.endpoint.lacks[familyOf(ip)]}}
		}
	} else if !ip.IsValid() { // a name
		if ips, _ = lookupIPs(ctx, addr[0].Protocol().Code, addr[0].Value()); len(ips) == 0 {
			return []dialled{{addr: addr, result: checkFailed, says: "the name has no address", announced: true}}
		}
	}
	return c.atIPs(ips[:min(len(ips), 2*maxCheckIPs)], addr[1:], !ip.IsUnspecified())
}

// atIPs returns the addresses that begin with each of ips and end in rest.
func (c *dialCheck) atIPs(ips []netip.Addr, rest ma.Multiaddr, announced bool) (found []dialled) {
	for _, ip := range ips {
		d := dialled{addr: ipAddr(ip).Encapsulate(rest), family: familyOf(ip), announced: announced}
		if announced && c.isForeign(ip) {
			// We do not dial it: here it may be a machine of our own network.
			d.result, d.says = checkFailed, "a private address, which only its own network can dial"
		} else if routeTo(ip) != "" {
			d.result, d.says = checkSkipped, "this machine has no "+d.family
		}
		found = append(found, d)
	}
	return found
}

// isForeign reports whether ip has a meaning only in some network, and the host that was
// asked is not in it.
func (c *dialCheck) isForeign(ip netip.Addr) bool {
	host := slices.Concat(c.endpoint.ips[ipv4], c.endpoint.ips[ipv6])
	if slices.ContainsFunc(host, netip.Addr.IsLoopback) {
		return false
	}
	isPrivate := func(ip netip.Addr) bool { return manet.IsPrivateAddr(ipAddr(ip)) }
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return ip.IsLoopback() || ip.IsMulticast() || ip == broadcast || isPrivate(ip) && !slices.ContainsFunc(host, isPrivate)
}

func ipAddr(ip netip.Addr) ma.Multiaddr {
	addr, _ := manet.FromIP(ip.AsSlice()) // which fails for other lengths than an Addr has
	return addr
}
