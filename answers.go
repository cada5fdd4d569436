package main

// Whom a DHT answer names. A client can dial only those that an answer names
// while its query runs, and a query ends only when all that were named have
// answered or failed, so this decides how fast devices meet.
//
// kad-dht names the closest to the key. It writes its answers to the streams of
// the host that it is given, and kadHost gives it streams on which the list of
// peers is replaced. Requests and records stay kad-dht's. The
// client's whole request takes as long as without (BenchmarkAnswer: 0.3 ms).

import (
	"slices"
	"strings"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/proto"
)

// maxNamed is how many peers an answer names at most: the k of Kademlia, K_VALUE in
// rust-libp2p.
const maxNamed = 20

// answers decides whom an answer names.
type answers struct {
	peers  *peers
	relays *relays
	groups *groups
	bridge *bridge

	// plain leaves answers as kad-dht makes them: for tests, to compare.
	plain bool
}

// amend returns kad-dht's answer to req, which came over conn, with the peers replaced
// that it names.
func (a *answers) amend(conn network.Conn, req *kadpb.Message, answer []byte) ([]byte, error) {
	if a.plain || req.GetType() != kadpb.Message_FIND_NODE && req.GetType() != kadpb.Message_GET_VALUE {
		return answer, nil
	}
	resp := new(kadpb.Message)
	if err := proto.Unmarshal(answer, resp); err != nil {
		return nil, err
	}
	resp.CloserPeers = kadpb.PeerInfosToPBPeers(a.peers.network, a.named(conn, req, resp.Record))
	return proto.Marshal(resp)
}

// named are the peers that an answer to req names, which came over conn:
//
//   - whom FIND_NODE asks for, with all addresses, though it be no DHT peer;
//   - for GET_VALUE, the asker's mates that are here: those who put the record lately,
//     the last one first. Who put it is known by the connection that it came on; a
//     record may claim any publisher. A mate is told under the addresses from which it
//     authenticated here, which are known from nowhere else, and one that the asker
//     has not met last with the bridge's. Who asks with the key knows as much as who
//     put it there: nobody else can guess it;
//   - the publisher of the record, if it is another relay's client, under the address
//     that the other relay tells;
//   - the other relays, so that the asker looks and publishes there, too;
//   - and no strangers, whether they can be dialled or not.
//
// Strangers do harm. A query waits 5 s for each that cannot be reached, three at
// a time. Each that can be enters the client's own table, and answers with
// others; and as soon as a client knows twenty, they are the closest ones that
// its queries begin and end with, and this relay is not asked any more. Measured
// with rust-libp2p among 1 000 strangers, half of them open: when answers were
// filled with open ones, 3 of 5 pairs met that could; with none, all. And a client
// that dials a stranger in vain spoils its dial of a mate over the bridge.
func (a *answers) named(conn network.Conn, req *kadpb.Message, rec *recpb.Record) []peer.AddrInfo {
	asker := conn.RemotePeer()
	named := make([]peer.AddrInfo, 0, maxNamed)
	name := func(id peer.ID, addrs []ma.Multiaddr) {
		// Who has left has no address.
		if len(addrs) > 0 && len(named) < maxNamed && !slices.ContainsFunc(named, func(i peer.AddrInfo) bool { return i.ID == id }) {
			named = append(named, peer.AddrInfo{ID: id, Addrs: addrs})
		}
	}
	switch target := peer.ID(req.Key); req.GetType() {
	case kadpb.Message_FIND_NODE:
		// The walk before a PUT has a record's key. It waits for all that are
		// named, up to 60 s and then in vain.
		if strings.HasPrefix(string(req.Key), recordPrefix) {
			break
		}
		if a.relays.named[target] == nil {
			name(target, a.peers.network.Peerstore().Addrs(target))
		}
		if len(named) == 0 {
			name(target, a.elsewhere(asker, target))
		}
	case kadpb.Message_GET_VALUE:
		for _, m := range a.bridge.choose(conn, a.groups.mates(string(req.Key), asker, time.Now())) {
			addrs := a.peers.told(m.id, asker)
			if m.bridge != nil {
				addrs = append(addrs[:min(len(addrs), maxAddrsPerPeer-1)], m.bridge)
			}
			name(m.id, addrs)
		}
		if publisher := publisherOf(rec); publisher != asker && publisher != "" && !a.peers.connected(publisher) {
			seen := a.elsewhere(asker, publisher)
			name(publisher, seen[:min(len(seen), 1)])
		}
	}
	for relay := range a.relays.named {
		if relay != asker {
			name(relay, a.peers.told(relay, asker))
		}
	}
	return named
}

// elsewhere are the addresses that other relays tell of a peer that is not here.
// They are not asked for one another, which might go round and round.
func (a *answers) elsewhere(asker, id peer.ID) []ma.Multiaddr {
	if said, err := a.peers.network.Peerstore().Get(asker, "ProtocolVersion"); err == nil && said == protocolVersion {
		return nil
	}
	return a.relays.find(id)
}
