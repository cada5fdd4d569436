package main

// Whom a DHT answer names. A client can dial only those that an answer names
// while its query runs, and a query ends only when all that were named have
// answered or failed, so this decides how fast devices meet.
//
// kad-dht names the closest to the key. It writes its answers to the streams of
// the host that it is given, and kadHost gives it streams on which the list of
// peers is replaced. Requests, records and the routing table stay kad-dht's.

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	pb "github.com/libp2p/go-libp2p-kad-dht/pb"
	kb "github.com/libp2p/go-libp2p-kbucket"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	// maxNamed is how many peers an answer names, and so the size up to which a
	// network is small: the k of Kademlia, K_VALUE in rust-libp2p.
	maxNamed = 20

	// fewNATed is how many of them may be strangers behind a NAT in a network
	// that is not small. rust-libp2p asks three peers at a time (ALPHA_VALUE),
	// and waits 5 s for one that does not answer: one place stays free.
	fewNATed = 2
)

// answers decides whom an answer names.
type answers struct {
	peers *peers

	// plain leaves answers as kad-dht makes them: for tests, to compare.
	plain bool
}

// amend returns kad-dht's answer to req with the peers replaced that it names.
func (a *answers) amend(asker peer.ID, req *pb.Message, answer []byte) ([]byte, error) {
	if a.plain || req.GetType() != pb.Message_FIND_NODE && req.GetType() != pb.Message_GET_VALUE {
		return answer, nil
	}
	resp := new(pb.Message)
	if err := proto.Unmarshal(answer, resp); err != nil {
		return nil, err
	}
	resp.CloserPeers = pb.PeerInfosToPBPeers(a.peers.network, a.named(asker, req, resp.Record))
	return proto.Marshal(resp)
}

// named are the peers that an answer to req names:
//
//   - whom FIND_NODE asks for, with all addresses, though it be no DHT peer;
//   - the publisher of the record, however far from the key: it is the mate that
//     the asker looks for, whose addresses it knows from nowhere else;
//   - in a small network everybody, and otherwise the closest that are open to
//     strangers and fewNATed of those that are not.
//
// A record may claim any publisher. It is told under the addresses from which it
// authenticated here, or not at all.
func (a *answers) named(asker peer.ID, req *pb.Message, rec *recpb.Record) []peer.AddrInfo {
	named := make([]peer.AddrInfo, 0, maxNamed)
	name := func(id peer.ID, addrs []ma.Multiaddr) bool {
		if len(addrs) == 0 || slices.ContainsFunc(named, func(i peer.AddrInfo) bool { return i.ID == id }) {
			return false // who has left has no address
		}
		named = append(named, peer.AddrInfo{ID: id, Addrs: addrs})
		return true
	}
	if req.Type == pb.Message_FIND_NODE {
		target := peer.ID(req.Key)
		name(target, a.peers.network.Peerstore().Addrs(target))
	}
	if publisher := publisherOf(rec); publisher != asker {
		name(publisher, a.peers.told(publisher, asker))
	}

	// A FIND_NODE for a record's key is the walk before a PUT, which waits for
	// every peer that is named: 15 s for nine behind NATs, and at 60 s nothing
	// is stored anywhere. So it is told of none, in no network.
	beforePut := req.Type == pb.Message_FIND_NODE && strings.HasPrefix(string(req.Key), recordPrefix)
	size := a.peers.table.Size()
	natted, places := 0, make(map[netip.Prefix]bool, maxNamed)
	for _, id := range a.peers.table.NearestPeers(kb.ConvertKey(string(req.Key)), size) {
		if len(named) == maxNamed {
			break
		}
		if id == asker {
			continue
		}
		if !a.peers.open(id) {
			if !beforePut && (size <= maxNamed || natted < fewNATed) && name(id, a.peers.told(id, asker)) {
				natted++
			}
			continue
		}
		// One of each IPv4 /24, so that nobody fills answers with peers that he
		// lets be dialled in vain.
		addrs := a.peers.told(id, asker)
		place := placeOf(addrs)
		if size > maxNamed && places[place] && !place.Addr().IsLoopback() {
			continue
		}
		if name(id, addrs) {
			places[place] = true
		}
	}
	return named
}

// placeOf is the /24 of the first IPv4 address, or zero.
func placeOf(addrs []ma.Multiaddr) netip.Prefix {
	for _, a := range addrs {
		if ip, err := manet.ToIP(a); err == nil && ip.To4() != nil {
			place, _ := netip.AddrFrom4([4]byte(ip.To4())).Prefix(24)
			return place
		}
	}
	return netip.Prefix{}
}

// publisherOf is who put the record, as it says, or "".
func publisherOf(rec *recpb.Record) peer.ID {
	for unknown := rec.ProtoReflect().GetUnknown(); len(unknown) > 0; {
		num, typ, n := protowire.ConsumeField(unknown)
		if n < 0 {
			return ""
		}
		if num == publisherField && typ == protowire.BytesType {
			_, _, tag := protowire.ConsumeTag(unknown)
			id, _ := protowire.ConsumeBytes(unknown[tag:])
			return peer.ID(id)
		}
		unknown = unknown[n:]
	}
	return ""
}

// kadHost is the host that kad-dht is given: it bounds the requests on the
// streams that kad-dht handles, and amends the answers.
type kadHost struct {
	host.Host
	answers *answers
}

func (h kadHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) {
		handle(&kadStream{boundedStream: boundedStream{Stream: s}, answers: h.answers})
	})
}

// kadStream is one on which kad-dht reads requests and writes an answer to each.
type kadStream struct {
	boundedStream
	answers *answers

	// request is the one being handled; kad-dht's request hook sets it.
	request *pb.Message

	// answer is what was written of the answer to it.
	answer []byte
}

// Write gathers an answer, which kad-dht writes as a varint length and as many
// bytes (kad-dht spec, RPC messages), in pieces, and sends it amended.
func (s *kadStream) Write(p []byte) (int, error) {
	s.answer = append(s.answer, p...)
	length, n := binary.Uvarint(s.answer)
	if n <= 0 || uint64(len(s.answer)-n) < length {
		return len(p), nil // not yet whole
	}
	amended, err := s.answers.amend(s.Conn().RemotePeer(), s.request, s.answer[n:])
	if err != nil {
		return 0, err
	}
	frame := append(binary.AppendUvarint(nil, uint64(len(amended))), amended...)
	s.answer, s.request = nil, nil // a stream may idle for a minute
	if _, err := s.Stream.Write(frame); err != nil {
		return 0, err
	}
	return len(p), nil
}
