package main

// The first steps of `check`: which addresses the host has, and what its identity
// endpoint says.

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

const (
	// maxCheckIPs is how many addresses of one name are used, in each family.
	maxCheckIPs = 2

	// maxIdentityBody bounds the endpoint's answer, in bytes: eight announced
	// names of 253 characters are 3 KiB.
	maxIdentityBody = 64 << 10
)

// checkTarget is the relay as the operator named it. parseCheckTarget makes it.
type checkTarget struct {
	given string // what the operator wrote
	host  string // a DNS name, or an IP address without brackets

	// url is the identity endpoint. It is nil if the operator gave a multiaddr,
	// which is in addr and id.
	url  *url.URL
	addr ma.Multiaddr // without /p2p
	id   peer.ID
}

// hostCheck finds the addresses of the target's host.
type hostCheck struct {
	checkTarget

	ips     map[family][]netip.Addr // the host's, at most maxCheckIPs each
	noRoute map[family]error        // why this machine can't send to them
}

// resolve finds the host's addresses, and which of them this machine can send to.
func (c *hostCheck) resolve(ctx context.Context) checkStep {
	needsAddress := "needs an address of " + c.host
	ip, err := netip.ParseAddr(c.host)
	found := []netip.Addr{ip.Unmap()}
	isName := err != nil
	if isName {
		if found, err = lookupIPs(ctx, c.host); err != nil {
			return stepFailed(likely("the name is mistyped, or its DNS record is missing or not yet known everywhere", "getent ahosts "+c.host),
				"%s has no address: %v", c.host, err).blocking(needsAddress)
		}
	}
	c.ips, c.noRoute = make(map[family][]netip.Addr), make(map[family]error)
	var all []string
	for _, ip := range found {
		f := familyOf(ip)
		if len(c.ips[f]) < maxCheckIPs && (c.addr == nil || standsFor(c.addr, ip)) {
			c.ips[f] = append(c.ips[f], ip)
			all = append(all, ip.String())
		}
	}
	if len(all) == 0 { // /dns4 or /dns6 before a name that has the other
		return stepFailed(likely("the DNS record for this family is missing", "getent ahosts "+c.host),
			"%s has no such address", c.addr).blocking(needsAddress)
	}
	for f, ips := range c.ips {
		if err := routeTo(ips[0]); err != nil {
			c.noRoute[f] = err
		}
	}
	s := stepPassed("%s", strings.Join(all, ", "))
	switch {
	case len(c.noRoute) == len(c.ips):
		s = stepFailed(likely("this machine has no network, or not of this family", "ip route"),
			"no route to %s", strings.Join(all, ", ")).blocking("needs a way to " + c.host)
	case !isName:
		s = stepSkipped("%s is an address", c.host)
	}
	return s.with(map[string]any{"addresses": all})
}

// missing reports whether f can't be checked, because the host or this machine
// lacks it. If so, the step says which.
func (c *hostCheck) missing(f family) (checkStep, bool) {
	switch {
	case len(c.ips[f]) == 0 && net.ParseIP(c.host) != nil:
		return stepSkipped("%s was asked for", c.host), true
	case len(c.ips[f]) == 0:
		return stepSkipped("%s has no %v address", c.host, f), true
	case c.noRoute[f] != nil:
		return stepSkipped("this machine has no %v: %v", f, c.noRoute[f]), true
	}
	return checkStep{}, false
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

// standsFor reports whether ip is of the family that addr, which has a name, wants.
func standsFor(addr ma.Multiaddr, ip netip.Addr) bool {
	switch addr[0].Protocol().Code {
	case ma.P_DNS4:
		return ip.Is4()
	case ma.P_DNS6:
		return ip.Is6()
	}
	return true
}

// lookupIPs returns the addresses of host without zones, which multiaddrs don't have.
func lookupIPs(ctx context.Context, host string) ([]netip.Addr, error) {
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
		return withoutAddrs(err)
	}
	return conn.Close()
}

// withoutAddrs is err without the addresses that a failed dial names: the reader
// knows them.
func withoutAddrs(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}

// endpointCheck asks the identity endpoint, as clients do.
type endpointCheck struct {
	host    *hostCheck
	answers map[family]endpointAnswer

	// id is the relay's by the endpoint that answered, IPv4 before IPv6, or by the
	// target. "" if there is neither.
	id     peer.ID
	listed []string // addresses in that answer; nil if there was none
}

// ask asks over both families at once.
func (c *endpointCheck) ask(ctx context.Context) {
	c.id, c.answers = c.host.id, make(map[family]endpointAnswer)
	if c.host.url == nil {
		return
	}
	var mu sync.Mutex
	var asking sync.WaitGroup
	for f, ips := range c.host.ips {
		if c.host.noRoute[f] == nil {
			asking.Go(func() {
				a := askEndpoint(ctx, c.host.url, ips[0])
				mu.Lock()
				defer mu.Unlock()
				c.answers[f] = a
			})
		}
	}
	asking.Wait()
	for _, f := range []family{ipv4, ipv6} {
		if a, asked := c.answers[f]; asked && a.err == nil {
			c.id, c.listed = a.id, append([]string{}, a.addrs...)
			return
		}
	}
}

// over says how the endpoint answered over f.
func (c *endpointCheck) over(f family) checkStep {
	if c.host.url == nil {
		return stepSkipped("not needed: the address names the peer ID")
	}
	if s, missing := c.host.missing(f); missing {
		return s
	}
	a := c.answers[f]
	at := net.JoinHostPort(c.host.ips[f][0].String(), c.host.url.Port())
	s := stepPassed("%s: %s", at, a.id)
	switch {
	case a.err != nil:
		s = stepFailed(a.why, "%s: %v", at, a.err)
	case a.id != c.id:
		s = stepFailed(likely("the name's addresses belong to two different relays", "getent ahosts "+c.host.host),
			"%s names %s, but over IPv4 it is %s", at, a.id, c.id)
	}
	s.Millis = millis(a.took)
	return s
}

// endpointAnswer is what the identity endpoint says over one family.
type endpointAnswer struct {
	took  time.Duration
	id    peer.ID
	addrs []string

	// err is why there is no answer, and why what is likely wrong.
	err error
	why diagnosis
}

func (a *endpointAnswer) fail(err error, cause string, try ...string) {
	a.err, a.why = err, likely(cause, try...)
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
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		a.err = err
		return a
	}
	req.Header.Set("User-Agent", "privstack-relay-check/"+buildVersion())
	resp, err := client.Do(req)
	if err != nil {
		a.failNoResponse(ctx, err, u, connected.Load())
		return a
	}
	defer resp.Body.Close()
	a.read(ctx, resp, u)
	return a
}

// failNoResponse says why a request to u got no response but err; connected, whether
// TCP was.
func (a *endpointAnswer) failNoResponse(ctx context.Context, err error, u *url.URL, connected bool) {
	port := u.Port()
	if e := (*url.Error)(nil); errors.As(err, &e) {
		err = e.Err // without the URL, which is known
	}
	err = withoutAddrs(err)
	switch timedOut := ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded); {
	case timedOut && !connected:
		a.fail(errors.New("no answer"), "TCP "+port+" is closed in the firewall of the machine or of its provider", "ufw allow "+port+"/tcp", "systemctl status privstack-relay")
	case timedOut:
		a.failHung(errors.New("takes the connection and does not answer in time"), port)
	case strings.Contains(err.Error(), "refused"):
		a.fail(err, "nothing listens on TCP "+port+": the relay is not running, or has another --http-port", "systemctl status privstack-relay")
	case !connected:
		a.fail(err, "the machine is not reached: it is down, or a firewall rejects TCP "+port, "ufw allow "+port+"/tcp")
	case strings.Contains(err.Error(), "x509") || strings.Contains(err.Error(), "tls:"):
		a.fail(err, "the reverse proxy has no valid certificate for "+u.Hostname(), "curl -v "+u.String())
	default:
		a.fail(err, "something else than a relay answers on TCP "+port, "curl -v "+u.String())
	}
}

func (a *endpointAnswer) failHung(err error, port string) {
	a.fail(err, "the program on TCP "+port+" hangs, or is none that speaks HTTP", "ss -ltnp 'sport = :"+port+"'", "systemctl restart privstack-relay")
}

// read takes the identity from the response to a request for u.
func (a *endpointAnswer) read(ctx context.Context, resp *http.Response, u *url.URL) {
	see := "curl -i " + u.String()
	if resp.StatusCode != http.StatusOK {
		a.fail(fmt.Errorf("HTTP status %d", resp.StatusCode), "another program answers on this port, or the reverse proxy does not pass "+identityRoute+" on", see)
		return
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIdentityBody+1))
	if err != nil && ctx.Err() != nil {
		a.failHung(errors.New("begins to answer and does not end in time"), u.Port())
		return
	}
	if err == nil && len(body) > maxIdentityBody {
		err = fmt.Errorf("the answer is longer than %d bytes", maxIdentityBody)
	}
	var answer identityResponse
	if err == nil {
		if err = json.Unmarshal(body, &answer); err != nil {
			err = fmt.Errorf("the answer is not a relay's identity: %w", err)
		}
	}
	if err == nil {
		if a.id, err = peer.Decode(answer.PeerID); err != nil {
			err = fmt.Errorf("peer_id %q: %w", answer.PeerID, err)
		}
	}
	if err != nil {
		a.fail(err, "another program answers there", see)
		return
	}
	a.addrs = answer.Addresses
}
