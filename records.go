package main

// Where the DHT's records are kept: in memory, within bounds that are shared
// fairly. kad-dht's own store is an unbounded map.

import (
	"container/heap"
	"container/list"
	"context"
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	ds "github.com/ipfs/go-datastore"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"
)

// recordStore keeps records within its bounds. Beyond them it drops one record after
// another: it takes the network that holds most, in it the peer that holds most, and
// drops the record that this peer put longest ago. So whoever fills the store loses his
// own records and nobody else's. Where all hold the same, the oldest record goes.
//
// It is the datastore under kad-dht's value store, which calls only Get, Put and Delete.
// The other methods are the null datastore's, which holds nothing.
type recordStore struct {
	ds.NullDatastore
	maxRecords int
	maxBytes   int64
	seed       maphash.Seed

	mu      sync.Mutex
	records map[ds.Key]*storedRecord
	byAge   list.List // of *storedRecord, the one put longest ago first
	holders map[holderID]*holder
	all     holder // of all networks

	// senders maps the hash of each record about to be stored to its sender.
	// kad-dht does not tell its datastore who sent a record, so the hook before
	// it does, by expect.
	senders *simplelru.LRU[uint64, holderID]
}

type storedRecord struct {
	key  ds.Key
	data []byte // an encoded record
	put  time.Time
	keep time.Duration // from put

	owner        *holder
	inAge, inOwn *list.Element
}

// holderID is a peer in a network (see networkOf), or the network if peer is "".
type holderID struct {
	network netip.Prefix
	peer    peer.ID
}

// holderOf returns who is at the other end of c.
func holderOf(c network.Conn) holderID {
	return holderID{networkOf(ipOf(c.RemoteMultiaddr())), c.RemotePeer()}
}

// holder counts what a peer, a network, or all networks together hold.
type holder struct {
	id     holderID
	parent *holder // nil for all of them
	bytes  int64   // overhead included

	records list.List // a peer's *storedRecord, the one put longest ago first
	parts   holders   // a network's peers, or all networks
	index   int       // in the parent's parts
}

// share returns what h holds in units of avgRecord, so that nobody loses a record
// for holding a few bytes more than others.
func (h *holder) share() int64 { return (h.bytes + avgRecord - 1) / avgRecord }

// oldest returns when that record of h was put which would be dropped next.
func (h *holder) oldest() time.Time {
	for len(h.parts) > 0 {
		h = h.parts[0]
	}
	if front := h.records.Front(); front != nil {
		return front.Value.(*storedRecord).put
	}
	return time.Time{} // h is about to get its first record, or has lost its last
}

// holders is a heap. First comes the one that holds most, and of equals the one
// whose record was put longest ago.
type holders []*holder

func (h holders) Len() int { return len(h) }
func (h holders) Less(i, j int) bool {
	if a, b := h[i].share(), h[j].share(); a != b {
		return a > b
	}
	return h[i].oldest().Before(h[j].oldest())
}
func (h holders) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *holders) Push(x any) {
	x.(*holder).index = len(*h)
	*h = append(*h, x.(*holder))
}

func (h *holders) Pop() any {
	last := (*h)[len(*h)-1]
	(*h)[len(*h)-1] = nil
	*h = (*h)[:len(*h)-1]
	return last
}

// recordOverhead is what a record costs besides its key and data, in bytes, if it has a
// holder and a network of its own. Measured: 835.
const recordOverhead = 896

// maxSenders is how many records can be on their way from expect to Put. If there were
// more, the store would forget who sent the first of them.
const maxSenders = 4096

func newRecordStore(maxRecords int, maxBytes int64) *recordStore {
	senders, err := simplelru.NewLRU[uint64, holderID](maxSenders, nil)
	if err != nil {
		panic(err) // only for a size below one
	}
	return &recordStore{
		maxRecords: maxRecords, maxBytes: maxBytes,
		seed:    maphash.MakeSeed(),
		records: make(map[ds.Key]*storedRecord),
		holders: make(map[holderID]*holder),
		senders: senders,
	}
}

// expect tells the store that rec is about to be put, and who sent it.
func (s *recordStore) expect(rec *recpb.Record, sender holderID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.senders.Add(s.hash(rec), sender)
}

// hash tells apart records of one key that several peers put at the same time.
func (s *recordStore) hash(rec *recpb.Record) uint64 {
	var h maphash.Hash
	h.SetSeed(s.seed)
	h.Write(rec.GetKey())
	h.WriteByte(0)
	h.Write(rec.GetValue())
	h.Write(rec.ProtoReflect().GetUnknown())
	return h.Sum64()
}

// Get returns the encoded record, or ds.ErrNotFound. It drops a record whose time is
// over. A record that is asked for lives no longer than others.
func (s *recordStore) Get(_ context.Context, key ds.Key) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, ok := s.records[key]
	if !ok {
		return nil, ds.ErrNotFound
	}
	if time.Since(rec.put) > rec.keep {
		s.remove(rec)
		return nil, ds.ErrNotFound
	}
	return rec.data, nil
}

// Put keeps data, which the caller must not change, and drops what is too old or
// too much.
func (s *recordStore) Put(_ context.Context, key ds.Key, data []byte) error {
	rec := new(recpb.Record)
	decodeErr := proto.Unmarshal(data, rec)
	s.mu.Lock()
	defer s.mu.Unlock()
	var owner holderID // nobody, unless expect has told us
	keep := maxRecordAge
	if decodeErr == nil {
		owner, _ = s.senders.Peek(s.hash(rec))
		// rust-libp2p keeps a record for its ttl, but for no longer than its own age
		// limit (record_received in its kad behaviour.rs).
		if extras, err := readExtras(rec); err == nil && extras.ttl > 0 {
			keep = min(extras.ttl, maxRecordAge)
		}
	}
	if old, ok := s.records[key]; ok {
		s.remove(old)
	}
	s.add(&storedRecord{key: key, data: data, put: time.Now(), keep: keep}, owner)
	for front := s.byAge.Front(); front != nil && time.Since(front.Value.(*storedRecord).put) > maxRecordAge; front = s.byAge.Front() {
		s.remove(front.Value.(*storedRecord))
	}
	for s.all.bytes > s.maxBytes || len(s.records) > s.maxRecords {
		most := &s.all
		for len(most.parts) > 0 {
			most = most.parts[0]
		}
		s.remove(most.records.Front().Value.(*storedRecord))
	}
	return nil
}

// Delete drops the record, if there is one.
func (s *recordStore) Delete(_ context.Context, key ds.Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec, ok := s.records[key]; ok {
		s.remove(rec)
	}
	return nil
}

// held returns how many records there are, and how many bytes they take with
// everything that keeping them costs.
func (s *recordStore) held() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records), s.all.bytes
}

func (r *storedRecord) size() int64 {
	return int64(len(r.key.String()) + len(r.data) + recordOverhead)
}

func (s *recordStore) add(rec *storedRecord, owner holderID) {
	network := s.holder(holderID{network: owner.network}, &s.all)
	if owner.peer == "" {
		owner.peer = "?" // nobody's; "" would be the network itself
	}
	rec.owner = s.holder(owner, network)
	rec.inOwn = rec.owner.records.PushBack(rec)
	rec.inAge = s.byAge.PushBack(rec)
	s.records[rec.key] = rec
	s.count(rec.owner, rec.size())
}

// holder returns the part of parent that is called id, and adds it if there is none.
func (s *recordStore) holder(id holderID, parent *holder) *holder {
	h := s.holders[id]
	if h == nil {
		h = &holder{id: id, parent: parent}
		s.holders[id] = h
		heap.Push(&parent.parts, h)
	}
	return h
}

func (s *recordStore) remove(rec *storedRecord) {
	delete(s.records, rec.key)
	s.byAge.Remove(rec.inAge)
	rec.owner.records.Remove(rec.inOwn)
	s.count(rec.owner, -rec.size())
}

// count adds bytes to what h and those above it hold, and forgets those that hold
// nothing.
func (s *recordStore) count(h *holder, bytes int64) {
	for ; h.parent != nil; h = h.parent {
		h.bytes += bytes
		if h.bytes > 0 {
			heap.Fix(&h.parent.parts, h.index)
			continue
		}
		heap.Remove(&h.parent.parts, h.index)
		delete(s.holders, h.id)
	}
	h.bytes += bytes
}

var _ ds.Batching = (*recordStore)(nil)
