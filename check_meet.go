package main

// The last steps of `check`: two clients publish, find and reach each other.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// checkRecordTTL is the ttl of the record that a check leaves at the relay, in seconds.
const checkRecordTTL = 60

// meetCheck has two clients meet through the relay.
type meetCheck struct {
	dials    *dialCheck // the first client is the one that it uses
	second   *checkClient
	identity identifypb.Identify // what the relay says about itself and us
	key      []byte              // of the record that makes the two a group; nil: there is none
	reserved bool                // by the second client
	dataMost int64               // bytes that a circuit carries each way; 0 is unlimited, or unknown
}

// close ends both clients.
func (c *meetCheck) close() {
	if c.dials.used != nil {
		c.dials.used.client.close()
	}
	if c.second != nil {
		c.second.close()
	}
}

// identify compares what the relay says about itself with what it should be.
func (c *meetCheck) identify(ctx context.Context) (s checkStep) {
	// https://github.com/libp2p/specs/tree/master/identify
	_, err := c.dials.used.client.request(ctx, identify.ID, nil, &c.identity)
	if err != nil {
		c.identity.Reset()
	}
	says, agent := c.identity.GetProtocolVersion(), c.identity.GetAgentVersion()
	switch {
	case isRefusal(err):
		s = stepFailed(whyFull(), "the relay closed the connection after the handshake").blocking("needs a relay that has room")
	case err != nil:
		s = stepFailed(whyNoAnswer(err, "identify"), "%s", errText(err))
	case says != protocolVersion:
		s = stepFailed(likely("this is a libp2p node, but not a PrivStack relay"), "its protocol version is %q (agent %q), not %s", says, agent, protocolVersion)
	default:
		s = stepPassed("%s, agent %s", says, agent)
	}
	return s.with(map[string]any{"protocol_version": says, "agent_version": agent})
}

// observed says at which address the relay sees us, which is what it tells others.
func (c *meetCheck) observed(context.Context) checkStep {
	addr, err := ma.NewMultiaddrBytes(c.identity.GetObservedAddr())
	seen := ""
	if err == nil {
		_, seen, err = manet.DialArgs(addr) // IP address and port
	}
	if err != nil {
		return stepFailed(likely("not a PrivStack relay: devices in two homes will not find each other"), "the relay does not say at which address it sees us: %v", err)
	}
	s := stepPassed("the relay sees us at %s", seen)
	if manet.IsPrivateAddr(addr) && !manet.IsPrivateAddr(c.dials.used.addr) {
		s = stepFailed(likely("a proxy or NAT in front of the relay, such as a container's port forwarding, hides where clients are: devices are told useless addresses of each other, and all share one address's limit",
			"run the container with --network host",
			"or, without root: podman run --network slirp4netns:port_handler=slirp4netns ..."),
			"the relay sees us at %s, which is private", seen)
	}
	return s.with(map[string]any{"address": seen})
}

// clients connects the second client.
func (c *meetCheck) clients(ctx context.Context) checkStep {
	var err error
	if c.second, err = dialCheckClient(ctx, c.dials.used.addr, c.dials.relayID); err != nil {
		return stepFailed(whyNoAnswer(err, "two clients"), "%s", errText(err)).blocking("needs two clients")
	}
	return stepPassed("two throw-away clients are connected")
}

// whyNoAnswer explains why the relay did not serve what a step asked for.
func whyNoAnswer(err error, what string) diagnosis {
	switch {
	case isRefusal(err):
		return whyFull()
	case isTimeout(err):
		return likely("the relay hangs or is overloaded, or the path to it loses packets", "systemctl restart privstack-relay")
	}
	return likely("not a PrivStack relay, or another version: it does not serve "+what, "privstack-relay --version")
}

// dht asks for each client's own ID, as clients do first, and then for the other's.
func (c *meetCheck) dht(ctx context.Context) checkStep {
	first, second := c.dials.used.client, c.second
	resp := new(kadpb.Message)
	// Only an answer shows that the relay has let a client in. The handshake does not.
	for _, q := range []struct{ asks, wants *checkClient }{{second, second}, {first, first}, {first, second}} {
		req := kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(q.wants.id), 0)
		if _, err := q.asks.request(ctx, kadProtocol, req, resp); err != nil {
			return stepFailed(whyNoAnswer(err, string(kadProtocol)), "FIND_NODE: %s", errText(err))
		}
	}
	for _, p := range resp.CloserPeers {
		if addrs := p.Addresses(); peer.ID(p.Id) == second.id && len(addrs) > 0 {
			return stepPassed("tells one client where the other is: %s", addrs[0]).with(map[string]any{"address": addrs[0].String()})
		}
	}
	return stepFailed(likely("not a PrivStack relay, or the old one: devices in two homes will not find each other", "privstack-relay --version"),
		"answers, but does not tell where a connected client is")
}

// record has one client put a record, as clients do, and the other get it.
func (c *meetCheck) record(ctx context.Context) checkStep {
	key := append([]byte("/privstack/syncgroup/"), make([]byte, 32)...)
	rand.Read(key[len(key)-32:])
	put, err := putRecord(ctx, c.dials.used.client, key)
	if err != nil {
		return stepFailed(whyNoAnswer(err, "records under "+recordPrefix), "PUT_VALUE: %s", errText(err))
	}
	resp := new(kadpb.Message)
	if _, err := c.second.request(ctx, kadProtocol, kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0), resp); err != nil {
		return stepFailed(whyNoAnswer(err, "records under "+recordPrefix), "GET_VALUE: %s", errText(err))
	}
	got := resp.GetRecord()
	fields, err := readExtras(got)
	wrong := likely("not a PrivStack relay, or a faulty one: clients ignore such a record", "privstack-relay --version")
	switch {
	case got == nil:
		return stepFailed(wrong, "the relay does not find the record that it stored")
	case !bytes.Equal(got.GetKey(), key) || !bytes.Equal(got.GetValue(), put.Value):
		return stepFailed(wrong, "the record came back changed")
	case err != nil || !bytes.Equal(fields.encoded, put.ProtoReflect().GetUnknown()):
		return stepFailed(wrong, "the record came back without its publisher and ttl (fields %d and %d)", publisherField, ttlField)
	}
	c.key = key
	return stepPassed("stored by one client, read unchanged by the other, with publisher and ttl")
}

// putRecord has the client by put a record as clients do, and returns it.
func putRecord(ctx context.Context, by *checkClient, key []byte) (*recpb.Record, error) {
	value := fmt.Appendf(nil, `{"device_name":"privstack-relay check","addresses":[],"timestamp":%d}`, time.Now().Unix())
	put := &recpb.Record{Key: key, Value: value}
	put.ProtoReflect().SetUnknown(encodeExtras(by.id, checkRecordTTL))
	req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
	req.Record = put
	_, err := by.request(ctx, kadProtocol, req, new(kadpb.Message))
	return put, err
}

// bridge has the clients meet over the bridge, as two devices do that have no other way to
// each other: the first dials the second at the relay's own address.
func (c *meetCheck) bridge(ctx context.Context) checkStep {
	if c.key == nil {
		return stepSkipped("needs a record")
	}
	first, at := c.dials.used.client, c.dials.used.addr
	if seen, _ := ma.NewMultiaddrBytes(c.identity.GetObservedAddr()); manet.IsIPLoopback(at) && !manet.IsIPLoopback(seen) {
		return stepSkipped("the relay is reached through a loopback port that something forwards to it: no device comes that way")
	}
	named, err := c.offered(ctx)
	switch last := len(named) - 1; {
	case err != nil:
		return stepFailed(whyNoAnswer(err, "records under "+recordPrefix), "%s", errText(err))
	case last < 0 || !named[last].Equal(at): // nor would we dial another
		return stepFailed(likely("the relay is too old, or is about to stop: devices behind NATs will not meet", "privstack-relay --version", "journalctl -u privstack-relay --since -1h"),
			"the relay does not offer to carry packets between two clients that put the same record")
	}
	if err := c.second.takeFrom(ctx, first.id); err != nil {
		return stepSkipped("this machine does not let a client listen: %v", err)
	}
	begun := time.Now()
	dialling, cancel := context.WithTimeout(ctx, checkDialTime)
	defer cancel()
	conn, err := first.quic.Dial(dialling, at, c.second.id)
	switch {
	case errors.As(err, new(sec.ErrPeerIDMismatch)):
		return stepFailed(likely("a proxy, load balancer or NAT in front of the relay gives each connection a port of its own, so the relay cannot tell whose it is: devices behind NATs will not meet", "docker run --network host ..."),
			"one client dials the other: the relay answers, and not the other client")
	case err != nil:
		return stepFailed(likely("the relay carries as much as it may (see --max-bandwidth), or a firewall or proxy in front of it drops packets: devices behind NATs will not meet", "journalctl -u privstack-relay --since -1h"),
			"one client dials the other through the relay: %s", errText(err))
	}
	defer conn.Close()
	met, n, rtt, rate := time.Since(begun), 0, time.Duration(0), 0.0
	s, err := conn.OpenStream(ctx)
	if err == nil {
		context.AfterFunc(ctx, func() { s.Reset() })
		n, rtt, rate, err = echoOver(s)
	}
	if err != nil {
		why := "the path to the relay is slow or loses packets, or the relay carries too little: see --max-bandwidth, --circuit-bytes and --circuit-duration"
		return stepFailed(likely(why, "systemctl cat privstack-relay"), "cut after %d of %d bytes: %s", n, checkEchoBytes, errText(cmp.Or(ctx.Err(), err)))
	}
	return stepPassed("connected in %.0f ms; 1 MiB echoed at %.1f MiB/s; round trip %.1f ms", millis(met), rate, millis(rtt)).
		with(map[string]any{"connect_ms": millis(met), "mib_per_s": rate, "bridge_rtt_ms": millis(rtt)})
}

// offered has the second client put the record, too, and returns the addresses at which
// the relay then tells the first client to dial it: none if the relay does not name it.
func (c *meetCheck) offered(ctx context.Context) (at []ma.Multiaddr, err error) {
	ctx, cancel := context.WithTimeout(ctx, checkAskTime)
	defer cancel()
	if _, err := putRecord(ctx, c.second, c.key); err != nil {
		return nil, err
	}
	resp := new(kadpb.Message)
	_, err = c.dials.used.client.request(ctx, kadProtocol, kadpb.NewMessage(kadpb.Message_GET_VALUE, c.key, 0), resp)
	for _, p := range resp.CloserPeers {
		if peer.ID(p.Id) == c.second.id {
			at = p.Addresses()
		}
	}
	return at, err
}

// reserve takes a place at the relay for the second client.
func (c *meetCheck) reserve(ctx context.Context) checkStep {
	resp := new(circuitpb.HopMessage)
	_, err := c.second.request(ctx, proto.ProtoIDv2Hop, &circuitpb.HopMessage{Type: circuitpb.HopMessage_RESERVE.Enum()}, resp)
	switch {
	case err != nil:
		return stepFailed(whyNoAnswer(err, "the circuit relay"), "%s", errText(err))
	case resp.GetStatus() != circuitpb.Status_OK:
		return stepFailed(likely("the relay is full, or is about to stop", "journalctl -u privstack-relay --since -1h"), "the relay says %v", resp.GetStatus())
	}
	c.reserved, c.dataMost = true, int64(resp.GetLimit().GetData())
	var addrs []string
	private := true
	for _, b := range resp.GetReservation().GetAddrs() {
		a, _ := ma.NewMultiaddrBytes(b) // empty if it is none
		if a, _ = peer.SplitAddr(a); len(a) > 0 && len(addrs) < maxOfferedAddrs {
			addrs = append(addrs, a.String())
			private = private && manet.IsPrivateAddr(a)
		}
	}
	duration := time.Duration(resp.GetLimit().GetDuration()) * time.Second
	lasts, carries := "any time", "any amount"
	if duration > 0 {
		lasts = duration.String()
	}
	if c.dataMost > 0 {
		carries = fmt.Sprintf("%.4g MiB", float64(c.dataMost)/(1<<20))
	}
	s := stepPassed("accepted; one circuit may last %s and carry %s", lasts, carries)
	announce := tryFlag("--announce " + c.dials.endpoint.host)
	switch {
	case time.Until(time.Unix(int64(resp.GetReservation().GetExpire()), 0)) < 0:
		s = stepFailed(likely("the clock of the relay's machine or of this one is wrong", "timedatectl"), "accepted, but it has already expired")
	case len(addrs) == 0:
		s = stepFailed(likely("the relay does not know its own address: libp2p clients in Rust refuse such a reservation", announce...), "accepted, but without an address")
	case private && !manet.IsPrivateAddr(c.dials.used.addr):
		s = stepFailed(likely("the relay is behind a NAT and knows only its private address: nobody outside can use these", announce...), "accepted, but its addresses are all private")
	}
	s.Lines = addrs
	return s.with(map[string]any{"addresses": addrs, "duration_s": resp.GetLimit().GetDuration(), "data_bytes": c.dataMost})
}

// circuit has the clients meet over a circuit.
func (c *meetCheck) circuit(ctx context.Context) checkStep {
	if !c.reserved {
		return stepSkipped("needs a reservation")
	}
	first := c.dials.used.client
	var direct time.Duration
	pings, err := first.request(ctx, ping.ID, nil, nil)
	if err == nil {
		direct, err = pingOver(pings)
	}
	if err = cmp.Or(ctx.Err(), err); err != nil {
		return stepFailed(whyNoAnswer(err, "ping"), "ping: %s", errText(err))
	}
	// https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#hop-protocol
	req := &circuitpb.HopMessage{Type: circuitpb.HopMessage_CONNECT.Enum(), Peer: &circuitpb.Peer{Id: []byte(c.second.id)}}
	resp := new(circuitpb.HopMessage)
	circuit, err := first.request(ctx, proto.ProtoIDv2Hop, req, resp)
	if err == nil && resp.GetStatus() != circuitpb.Status_OK {
		err = fmt.Errorf("the relay says %v", resp.GetStatus())
	}
	if err != nil {
		return stepFailed(likely("the relay has as many circuits as it allows, is about to stop, or hangs", "journalctl -u privstack-relay --since -1h"), "the relay opens no circuit: %s", errText(err))
	}
	n, rtt, rate, err := echoOver(circuit)
	if err != nil {
		why := likely("the path to the relay is slow or loses packets")
		if c.dataMost > 0 && c.dataMost < 2*checkEchoBytes {
			why = likely(fmt.Sprintf("the relay cuts circuits at %d bytes, and a sync message has up to 16 MiB", c.dataMost), tryFlag("--circuit-bytes 1GiB")...)
		}
		return stepFailed(why, "cut after %d of %d bytes: %s", n, checkEchoBytes, errText(cmp.Or(ctx.Err(), err)))
	}
	added := max(0, rtt-direct) // on a fast path the difference is noise
	return stepPassed("1 MiB echoed at %.1f MiB/s; round trip %.1f ms, %.1f more than to the relay", rate, millis(rtt), millis(added)).
		with(map[string]any{"mib_per_s": rate, "circuit_rtt_ms": millis(rtt), "relay_rtt_ms": millis(direct), "added_ms": millis(added)})
}
