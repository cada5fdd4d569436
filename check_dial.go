package main

// The middle steps of `check`: which addresses the relay has, and whether it
// answers at each by QUIC.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/quic-go/quic-go"
)

// dialled is an address of the relay and what came of it.
type dialled struct {
	probe
	family    family
	announced bool   // by the operator, rather than the host that was asked
	not       string // why it was not dialled; empty if it was
	wrong     bool   // and clients would fail there
}

// works tells whether this address is the relay's.
func (d dialled) works() bool { return d.not == "" && d.err == nil }

// quic shakes hands; the first call does it with all of the relay's addresses.
func (c *checker) quic(ctx context.Context, f family) checkStep {
	if c.dials == nil {
		asking, cancel := context.WithTimeout(ctx, checkAskTime)
		c.dials = c.addrsToDial(asking)
		cancel()
		ctx, cancel = context.WithTimeout(ctx, checkDialTime)
		defer cancel()
		var dialling sync.WaitGroup
		own := 0
		for i := range c.dials {
			if d := &c.dials[i]; d.not == "" {
				probe := c.a.probeAsAnother
				if own < maxCheckOwn {
					probe = c.a.probe
					own++
				}
				dialling.Go(func() { d.probe = probe(ctx, d.addr, c.id) })
			}
		}
		dialling.Wait()
	}
	var best *dialled
	for i, d := range c.dials {
		if d.family == f && d.not == "" && (best == nil || !best.works() && d.works()) {
			best = &c.dials[i]
		}
	}
	if best == nil {
		if s, missing := c.missing(f); missing {
			return s
		}
		return skipped("the relay lists no %v address", f)
	}
	var s checkStep
	switch {
	case !best.works() && c.instead(*best):
		return skipped("%s: %s, and others are announced", best.addr, short(best.err))
	case !best.works():
		s = failed(c.whyNoQUIC(best), "%s: %s", best.addr, short(best.err))
	case c.id == "":
		c.id = best.id
		s = passed("%s is %s, which nothing promised", best.addr, best.id)
	case best.id != c.id: // nothing was promised, and the other family's is another
		s = failed(likely("the name's addresses belong to two different relays", "getent ahosts "+c.target.host), "%s is %s, not %s", best.addr, best.id, c.id)
	default:
		s = passed("%s answers with the promised peer ID", best.addr)
	}
	if s.Result == checkPassed && c.used == nil {
		c.used = &best.probe
	}
	s.Millis = millis(best.took)
	return s.with(map[string]any{"address": best.addr.String()})
}

// instead tells whether the operator says that the relay is elsewhere than at d: the
// endpoint that was asked may be behind a proxy.
func (c *checker) instead(d dialled) bool {
	return !d.announced && slices.ContainsFunc(c.dials, func(o dialled) bool { return o.announced })
}

// short is the part of a QUIC error that a reader can use.
func short(err error) string {
	if mismatch := (sec.ErrPeerIDMismatch{}); errors.As(err, &mismatch) {
		return fmt.Sprintf("is %s, and was promised to be %s", mismatch.Actual, mismatch.Expected)
	}
	if noAnswer(err) {
		return "no answer"
	}
	if refused(err) {
		return "the relay refuses the connection"
	}
	if errors.Is(err, network.ErrReset) {
		return "the stream was reset"
	}
	return err.Error()
}

func noAnswer(err error) bool {
	timeout := net.Error(nil) // which quic-go's timeouts are
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// refused tells whether the relay, at a limit, hung up: before the handshake, or
// with one of libp2p's codes after it.
func refused(err error) bool {
	if e := (*quic.TransportError)(nil); errors.As(err, &e) && e.ErrorCode == quic.ConnectionRefused {
		return true
	}
	e := (*quic.ApplicationError)(nil)
	return errors.As(err, &e) && (e.ErrorCode == quic.ApplicationErrorCode(network.ConnResourceLimitExceeded) || e.ErrorCode == quic.ApplicationErrorCode(network.ConnRateLimited))
}

func full() diagnosis {
	return likely("the relay is at its limit of clients, or of clients from this address: see --max-clients and --max-clients-per-ip", "journalctl -u privstack-relay --since -1h")
}

func (c *checker) whyNoQUIC(d *dialled) diagnosis {
	port, _ := d.addr.ValueForProtocol(ma.P_UDP)
	switch answers := c.listed != nil; {
	case errors.As(d.err, new(sec.ErrPeerIDMismatch)):
		return likely("another relay, or one with another key file, answers on UDP "+port+": clients will refuse it", "ss -lunp 'sport = :"+port+"'")
	case refused(d.err):
		return full()
	case noAnswer(d.err) && (answers || c.target.url == nil):
		return likely("UDP "+port+" is closed over "+d.family.String()+" in the firewall of the machine or of its provider", "ufw allow "+port+"/udp", "systemctl status privstack-relay")
	case noAnswer(d.err):
		return likely("the relay is not running, or UDP "+port+" is closed in a firewall", "systemctl status privstack-relay", "ufw allow "+port+"/udp")
	}
	return likely("something else than a relay answers on UDP "+port, "ss -lunp 'sport = :"+port+"'")
}

// addrsToDial are the relay's addresses as clients would find them: those that
// the endpoint lists, 0.0.0.0 and :: replaced with the host that was asked.
func (c *checker) addrsToDial(ctx context.Context) (dials []dialled) {
	dialling := 0
	add := func(d dialled) {
		if slices.ContainsFunc(dials, func(o dialled) bool { return o.addr.Equal(d.addr) }) {
			return
		}
		if d.not == "" {
			if dialling == maxCheckDials {
				d.not = "not dialled, there are too many"
			} else {
				dialling++
			}
		}
		dials = append(dials, d)
	}
	here := func(ips []netip.Addr, rest ma.Multiaddr, announced bool) {
		for _, ip := range ips {
			ip = ip.Unmap()
			d := dialled{family: familyOf(ip), announced: announced}
			d.addr = ipAddr(ip).Encapsulate(rest)
			switch {
			case announced && c.elsewhere(ip):
				// Nor is it our business to dial what is local to us.
				d.not, d.wrong = "a private address, which only its own network can dial", true
			case routeTo(ip) != nil:
				d.not = "this machine has no " + d.family.String()
			}
			add(d)
		}
	}
	ours := slices.Concat(c.ips[ipv4], c.ips[ipv6])

	switch {
	case c.target.addr != nil:
		here(ours, c.target.addr[1:], false)
		return dials
	case c.listed == nil: // the endpoint did not answer: the default port
		here(ours, ma.StringCast(fmt.Sprintf("/udp/%d/quic-v1", checkPort)), false)
		return dials
	}
	for i, s := range c.listed {
		if i == maxCheckListed {
			break
		}
		addr, err := ma.NewMultiaddr(s)
		if err == nil {
			addr, _ = peer.SplitAddr(addr)
		}
		if err != nil || !isQUICAddr(addr) {
			continue // other relays may have other transports
		}
		switch ip, err := manet.ToIP(addr); {
		case err != nil:
			named, _ := lookup(ctx, addr[0].Value())
			named = slices.DeleteFunc(named, func(ip netip.Addr) bool { return !standsFor(addr, ip) })
			if len(named) == 0 {
				add(dialled{probe: probe{addr: addr}, announced: true, not: "the name has no address", wrong: true})
			}
			here(named[:min(len(named), 2*maxCheckIPs)], addr[1:], true)
		case ip.IsUnspecified():
			f := ipv6
			if ip.To4() != nil {
				f = ipv4
			}
			here(c.ips[f], addr[1:], false)
			if len(c.ips[f]) == 0 {
				add(dialled{probe: probe{addr: addr}, family: f, not: fmt.Sprintf("%s has no %v address", c.target.host, f)})
			}
		default:
			ip, _ := netip.AddrFromSlice(ip)
			here([]netip.Addr{ip}, addr[1:], true)
		}
	}
	return dials
}

// elsewhere tells whether ip is local to a network that the host which was asked
// is not in.
func (c *checker) elsewhere(ip netip.Addr) bool {
	ours := slices.Concat(c.ips[ipv4], c.ips[ipv6])
	if slices.ContainsFunc(ours, netip.Addr.IsLoopback) {
		return false
	}
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return ip.IsLoopback() || ip.IsMulticast() || ip == broadcast || isLocal(ip) && !slices.ContainsFunc(ours, isLocal)
}

// isLocal tells whether ip means something in one network alone.
func isLocal(ip netip.Addr) bool {
	return manet.IsPrivateAddr(ipAddr(ip))
}

func ipAddr(ip netip.Addr) ma.Multiaddr {
	return ma.StringCast(fmt.Sprintf("/ip%d/%s", familyOf(ip), ip))
}

// addresses sums up what came of each address that the endpoint lists.
func (c *checker) addresses(context.Context) checkStep {
	if c.used == nil {
		c.blocked = "needs QUIC"
	}
	if c.listed == nil {
		return skipped("the identity endpoint lists them")
	}
	var s checkStep
	bad, good := 0, 0
	for _, d := range c.dials {
		switch {
		case d.works():
			good++
			s.Lines = append(s.Lines, fmt.Sprintf("✓ %s  %.0f ms", d.addr, millis(d.took)))
		case d.not != "" && !d.wrong:
			s.Lines = append(s.Lines, fmt.Sprintf("– %s  %s", d.addr, d.not))
		case d.not == "" && c.instead(d):
			s.Lines = append(s.Lines, fmt.Sprintf("– %s  %s, and others are announced", d.addr, short(d.err)))
		default:
			bad++
			why := d.not
			if why == "" {
				why = short(d.err)
			}
			s.Lines = append(s.Lines, fmt.Sprintf("✗ %s  %s", d.addr, why))
		}
	}
	s.Result, s.Detail = checkPassed, fmt.Sprintf("%d listed, %d answer", len(c.listed), good)
	if len(c.listed) > maxCheckListed {
		s.Detail += fmt.Sprintf("; only the first %d were looked at", maxCheckListed)
	}
	switch {
	case bad > 0:
		s.Result, s.Cause = checkFailed, "clients are told addresses at which the relay does not answer: see --announce, and the firewall for that family"
	case good == 0:
		s.Result, s.Cause = checkFailed, "none of them is a QUIC address that can be dialled from here"
	}
	return s.with(map[string]any{"listed": len(c.listed), "answer": good, "fail": bad})
}
