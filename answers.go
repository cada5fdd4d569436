package main

// Whom a DHT answer names. A client can dial only those that an answer names while
// its query runs, and a query ends only when all that were named have answered or
// failed. So this decides how fast devices meet.

import (
	"slices"
	"strings"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// answers decides whom an answer names.
type answers struct {
	peers      *peers
	federation *federation
	groups     *groups
	bridge     *bridge
}

// choose returns the peers that the answer to req names, which came over conn:
//
//   - for FIND_NODE, the peer that it asks for, with all its addresses, even if it is
//     no DHT peer; and if the asker has put the record of a group lately, the next device
//     of that group that it has not met, with the bridge's address. (Rust's kad asks so at
//     its start and half a second after each peer that it meets, and GET_VALUE only every
//     30 s: with GET_VALUE alone the pairs of a group of eight had met after 150 s but
//     for two of 28);
//   - for GET_VALUE, the other devices of the group that are here: those that have put
//     the record lately, the newest first. We know who put it by the connection that it
//     came on, because a record may claim any publisher. We give the addresses from
//     which the device authenticated here, which are known from nowhere else, and for
//     one that the asker has not met yet the bridge's as the last. Nobody who does not
//     belong to the group can guess its key;
//   - for both, if they have a record's key, the other relays that keep that record, so
//     that the asker looks and publishes there, too;
//   - and no strangers, nor other relays. A client asks every relay that it has met
//     about its record every 30 s, and half a second after each new one it looks for
//     random IDs. When those answers named the relays closest to the IDs, each client
//     of eight relays had met all after ten looks, and otherwise three.
//
// Strangers do harm. A query waits 5 s for each that cannot be reached, three at
// a time. Each that can be enters the client's own table, and answers with
// others; and as soon as a client knows twenty, its queries begin and end with the
// twenty closest of them, and this relay is not asked any more. Measured with
// rust-libp2p among 1 000 strangers, half of them open: when answers were filled
// with open ones, 3 of 5 pairs met that could; with none, all. And a client that
// dials a stranger in vain spoils its dial of another device over the bridge.
func (a *answers) choose(conn network.Conn, req *kadpb.Message) []peer.AddrInfo {
	asker := conn.RemotePeer()
	var chosen []peer.AddrInfo
	name := func(id peer.ID, addrs []ma.Multiaddr) {
		// A peer that has left has no address.
		if len(addrs) > 0 && len(chosen) < maxNamed && !slices.ContainsFunc(chosen, func(i peer.AddrInfo) bool { return i.ID == id }) {
			chosen = append(chosen, peer.AddrInfo{ID: id, Addrs: addrs})
		}
	}
	isRecord := isRecordKey(req.Key)
	switch req.GetType() {
	case kadpb.Message_FIND_NODE:
		if isRecord {
			break
		}
		if target := peer.ID(req.Key); a.peers.connected(target) {
			name(target, fitAddrs(a.peers.network.Peerstore().Addrs(target)))
		}
		for _, m := range a.bridge.choose(conn, a.mates(asker, req)) {
			if m.bridge != nil {
				name(m.id, a.overBridge(m, asker))
			}
		}
	case kadpb.Message_GET_VALUE:
		for _, m := range a.bridge.choose(conn, a.mates(asker, req)) {
			name(m.id, a.overBridge(m, asker))
		}
	}
	if isRecord {
		for _, id := range a.federation.keepers(req.Key) {
			if id != asker {
				name(id, a.federation.told(id))
			}
		}
	}
	return chosen
}

// mates returns those mates of asker that the answer to req may name, the newest first.
func (a *answers) mates(asker peer.ID, req *kadpb.Message) []peer.ID {
	switch {
	case req.GetType() == kadpb.Message_GET_VALUE:
		return a.groups.mates(string(req.Key), asker, time.Now())
	case req.GetType() == kadpb.Message_FIND_NODE && !isRecordKey(req.Key):
		return a.groups.allMates(asker, time.Now())
	}
	return nil
}

// isRecordKey reports whether key is that of a record. The walk before a PUT asks
// FIND_NODE for such a key.
func isRecordKey(key []byte) bool { return strings.HasPrefix(string(key), recordPrefix) }

// overBridge returns the addresses that we give asker of m, the bridge's last.
func (a *answers) overBridge(m mate, asker peer.ID) []ma.Multiaddr {
	addrs := a.peers.unasked(m.id, asker)
	if m.bridge != nil && len(addrs) > 0 {
		addrs = append(addrs[:min(len(addrs), maxAddrsPerPeer-1)], m.bridge)
	}
	return addrs
}
