package main

// The first steps of `check`: the host's addresses, and what its identity endpoint
// says.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// The first steps of `check`: the host's addresses, and what its identity endpoint
// says.

// resolve finds the host's addresses, and which of them this machine can send to.
func (c *checker) resolve(ctx context.Context) checkStep {
	host := c.target.host
	ip, err := netip.ParseAddr(host)
	ips := []netip.Addr{ip.Unmap()}
	isName := err != nil
	if isName {
		if ips, err = lookup(ctx, host); err != nil {
			c.blocked = "needs an address of " + host
			return failed(likely("the name is mistyped, or its DNS record is missing or not yet known everywhere", "getent ahosts "+host),
				"%s has no address: %v", host, err)
		}
	}
	var all []string
	for _, ip := range ips {
		f := familyOf(ip)
		if len(c.ips[f]) < maxCheckIPs && (c.target.addr == nil || standsFor(c.target.addr, ip)) {
			c.ips[f] = append(c.ips[f], ip)
			all = append(all, ip.String())
		}
	}
	if len(all) == 0 { // /dns4 or /dns6 before a name that has the other
		c.blocked = "needs an address of " + host
		return failed(likely("the DNS record for this family is missing", "getent ahosts "+host), "%s has no such address", c.target.addr)
	}
	for f, ips := range c.ips {
		if err := routeTo(ips[0]); err != nil {
			c.noRoute[f] = err
		}
	}
	values := map[string]any{"addresses": all}
	if len(c.noRoute) == len(c.ips) {
		c.blocked = "needs a way to " + host
		return failed(likely("this machine has no network, or not of this family", "ip route"), "no route to %s", strings.Join(all, ", ")).with(values)
	}
	if !isName {
		return skipped("%s is an address", host).with(values)
	}
	return passed("%s", strings.Join(all, ", ")).with(values)
}

// standsFor tells whether ip is of the family that addr, which has a name, wants.
func standsFor(addr ma.Multiaddr, ip netip.Addr) bool {
	switch addr[0].Protocol().Code {
	case ma.P_DNS4:
		return ip.Is4()
	case ma.P_DNS6:
		return ip.Is6()
	}
	return true
}

// lookup returns host's addresses without zones, which multiaddrs don't have.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for i, ip := range ips {
		ips[i] = ip.Unmap().WithZone("")
	}
	return ips, err
}

// routeTo says why this machine can't send to ip, or nil. Nothing is sent:
// connecting a UDP socket only looks up the way.
func routeTo(ip netip.Addr) error {
	conn, err := net.Dial("udp", net.JoinHostPort(ip.String(), "9"))
	if err != nil {
		return inner(err)
	}
	return conn.Close()
}

// inner is err without the addresses that a failed dial names, which are known.
func inner(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}

// endpointAnswer is what the identity endpoint says over one family.
type endpointAnswer struct {
	took  time.Duration
	id    peer.ID
	addrs []string
	err   error
	why   diagnosis
}

// identity asks the endpoint as clients do; the first call asks over both families.
func (c *checker) identity(ctx context.Context, f family) checkStep {
	if c.target.url == nil {
		return skipped("not needed: the address names the peer ID")
	}
	if c.endpoints == nil {
		c.endpoints = make(map[family]endpointAnswer)
		var mu sync.Mutex
		var asking sync.WaitGroup
		for f, ips := range c.ips {
			if c.noRoute[f] == nil {
				asking.Go(func() {
					a := askEndpoint(ctx, c.target.url, ips[0])
					mu.Lock()
					c.endpoints[f] = a
					mu.Unlock()
				})
			}
		}
		asking.Wait()
	}
	if s, missing := c.missing(f); missing {
		return s
	}
	a := c.endpoints[f]
	at := net.JoinHostPort(c.ips[f][0].String(), c.target.url.Port())
	var s checkStep
	switch {
	case a.err != nil:
		s = failed(a.why, "%s: %v", at, a.err)
	case c.id != "" && c.id != a.id:
		s = failed(likely("the name's addresses belong to two different relays", "getent ahosts "+c.target.host),
			"%s names %s, but over IPv4 it is %s", at, a.id, c.id)
	default:
		if c.id == "" {
			c.id, c.listed = a.id, append([]string{}, a.addrs...)
		}
		s = passed("%s: %s", at, a.id)
	}
	s.Millis = millis(a.took)
	return s
}

// family is IPv4 or IPv6.
type family int

const (
	ipv4 family = 4
	ipv6 family = 6
)

func (f family) String() string { return fmt.Sprintf("IPv%d", int(f)) }

func familyOf(ip netip.Addr) family {
	if ip.Is4() {
		return ipv4
	}
	return ipv6
}

// missing is the step where f can't be checked: the host or this machine lacks it.
func (c *checker) missing(f family) (checkStep, bool) {
	switch {
	case len(c.ips[f]) == 0 && net.ParseIP(c.target.host) != nil:
		return skipped("%s was asked for", c.target.host), true
	case len(c.ips[f]) == 0:
		return skipped("%s has no %v address", c.target.host, f), true
	case c.noRoute[f] != nil:
		return skipped("this machine has no %v: %v", f, c.noRoute[f]), true
	}
	return checkStep{}, false
}

// askEndpoint gets u from ip, whatever address its host name has.
func askEndpoint(ctx context.Context, u *url.URL, ip netip.Addr) (a endpointAnswer) {
	begun := time.Now()
	defer func() { a.took = time.Since(begun) }()
	var connected atomic.Bool
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			conn, err := new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
			connected.Store(err == nil)
			return conn, err
		},
		MaxResponseHeaderBytes: 16 << 10,
		DisableKeepAlives:      true,
	}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > 3 || req.URL.Hostname() != u.Hostname() {
			return fmt.Errorf("redirected to %s", req.URL)
		}
		return nil
	}}
	fail := func(err error, why diagnosis) endpointAnswer {
		a.err, a.why = err, why
		return a
	}

	port := u.Port()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return fail(err, diagnosis{})
	}
	req.Header.Set("User-Agent", "privstack-relay-check/"+buildVersion())
	resp, err := client.Do(req)
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // without the URL, which is known
		}
		err = inner(err)
		switch timedOut := ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded); {
		case timedOut && !connected.Load():
			return fail(errors.New("no answer"), likely("TCP "+port+" is closed in the firewall of the machine or of its provider", "ufw allow "+port+"/tcp", "systemctl status privstack-relay"))
		case timedOut:
			return fail(errors.New("takes the connection and does not answer in time"), hung(port))
		case strings.Contains(err.Error(), "refused"):
			return fail(err, likely("nothing listens on TCP "+port+": the relay is not running, or has another --http-port", "systemctl status privstack-relay"))
		case !connected.Load():
			return fail(err, likely("the machine is not reached: it is down, or a firewall rejects TCP "+port, "ufw allow "+port+"/tcp"))
		case strings.Contains(err.Error(), "x509") || strings.Contains(err.Error(), "tls:"):
			return fail(err, likely("the reverse proxy has no valid certificate for "+u.Hostname(), "curl -v "+u.String()))
		}
		return fail(err, likely("something else than a relay answers on TCP "+port, "curl -v "+u.String()))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("HTTP status %d", resp.StatusCode), likely("another program answers on this port, or the reverse proxy does not pass "+identityRoute+" on", "curl -i "+u.String()))
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIdentityBody+1))
	other := likely("another program answers there", "curl -i "+u.String())
	switch {
	case err != nil && ctx.Err() != nil:
		return fail(errors.New("begins to answer and does not end in time"), hung(port))
	case err != nil:
		return fail(err, other)
	case len(body) > maxIdentityBody:
		return fail(fmt.Errorf("the answer is longer than %d bytes", maxIdentityBody), other)
	}
	var identity identityResponse
	if err := json.Unmarshal(body, &identity); err != nil {
		return fail(fmt.Errorf("the answer is not a relay's identity: %w", err), other)
	}
	if a.id, err = peer.Decode(identity.PeerID); err != nil {
		return fail(fmt.Errorf("peer_id %q: %w", identity.PeerID, err), other)
	}
	a.addrs = identity.Addresses
	return a
}

func hung(port string) diagnosis {
	return likely("the program on TCP "+port+" hangs, or is none that speaks HTTP", "ss -ltnp 'sport = :"+port+"'", "systemctl restart privstack-relay")
}
