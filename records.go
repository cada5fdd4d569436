package main

// The DHT's values: which are let in, and where they are kept. kad-dht's own
// store is an unbounded map, and it reads requests of up to 4 MiB; this one is
// bounded in records and bytes, and so is what a request may bring.

import (
	"bytes"
	"container/heap"
	"container/list"
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	ds "github.com/ipfs/go-datastore"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	manet "github.com/multiformats/go-multiaddr/net"
	"google.golang.org/protobuf/proto"
)

// recordStore keeps records in memory, within bounds that are shared fairly: what
// has to go is the record put longest ago by the peer that holds most, in the
// network that holds most. So whoever fills the store loses his own records, and
// nobody else's; and where all hold the same, the record put longest ago goes.
//
// It is the datastore under kad-dht's value store, which calls Get, Put and
// Delete alone; the rest is the null datastore's, where nothing is.
type recordStore struct {
	ds.NullDatastore
	maxRecords int
	maxBytes   int64

	mu      sync.Mutex
	records map[ds.Key]*storedRecord
	byAge   list.List // of *storedRecord, the one put longest ago first
	holders map[holderID]*holder
	all     holder // of all networks

	// coming says for keys about to be put by whom. kad-dht's handler does not
	// tell its datastore, so the hook before it tells in advance.
	coming *simplelru.LRU[string, holderID]
}

type storedRecord struct {
	key  ds.Key
	data []byte // an encoded record
	put  time.Time

	owner        *holder
	inAge, inOwn *list.Element
}

// holderID is a peer in a network, or with "" the network: an IPv4 address or an
// IPv6 /56, as for connections.
type holderID struct {
	network netip.Prefix
	peer    peer.ID
}

// holder counts what a peer holds, a network, or all of them.
type holder struct {
	id     holderID
	parent *holder // nil for all of them
	bytes  int64   // overhead included

	records list.List // of *storedRecord, of a peer: as byAge
	parts   holders   // of a network: its peers; of all: the networks
	index   int       // in the parent's parts
}

// share is what h holds, so coarsely that nobody loses to others for a record of
// a few bytes more.
func (h *holder) share() int64 { return (h.bytes + avgRecord - 1) / avgRecord }

// oldest is when what would go next of h was put.
func (h *holder) oldest() time.Time {
	for len(h.parts) > 0 {
		h = h.parts[0]
	}
	if front := h.records.Front(); front != nil {
		return front.Value.(*storedRecord).put
	}
	return time.Time{} // it is about to be filled, or forgotten
}

// holders is a heap: first comes who holds most, and of equals the one with the
// record put longest ago.
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

// recordOverhead is what an entry costs beside its key and data, in bytes, where
// each record has a holder and a network of its own. Measured: 835.
const recordOverhead = 896

// maxComing is how many records can be on their way from the hook to the store
// before the first is taken to be nobody's: requests being handled at once.
const maxComing = 4096

func newRecordStore(maxRecords int, maxBytes int64) *recordStore {
	coming, err := simplelru.NewLRU[string, holderID](maxComing, nil)
	if err != nil {
		panic(err) // only for a size below one
	}
	return &recordStore{
		maxRecords: maxRecords, maxBytes: maxBytes,
		records: make(map[ds.Key]*storedRecord),
		holders: make(map[holderID]*holder),
		coming:  coming,
	}
}

// from tells the store who is about to put the record of req, if it holds one
// that kad-dht will let in.
func (s *recordStore) from(c network.Conn, req *kadpb.Message) {
	rec := req.GetRecord()
	if req.GetType() != kadpb.Message_PUT_VALUE || rec == nil || !bytes.Equal(req.Key, rec.Key) || (recordValidator{}).Validate(string(rec.Key), rec.Value) != nil {
		return
	}
	id := holderID{peer: c.RemotePeer()}
	if ip, err := manet.ToIP(c.RemoteMultiaddr()); err == nil {
		addr, _ := netip.AddrFromSlice(ip)
		id.network = networkOf(addr.Unmap())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.coming.Add(string(rec.Key), id)
}

// Get returns the encoded record, or ds.ErrNotFound. It does not count as use.
func (s *recordStore) Get(_ context.Context, key ds.Key) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, ok := s.records[key]
	if !ok || time.Since(rec.put) > maxRecordAge {
		return nil, ds.ErrNotFound
	}
	return rec.data, nil
}

// Put keeps data, which the caller must not change, and drops what is too old or
// too much.
func (s *recordStore) Put(_ context.Context, key ds.Key, data []byte) error {
	var owner holderID
	decoded := new(recpb.Record)
	decodeErr := proto.Unmarshal(data, decoded)
	s.mu.Lock()
	defer s.mu.Unlock()
	if decodeErr == nil {
		owner, _ = s.coming.Peek(string(decoded.Key))
		s.coming.Remove(string(decoded.Key))
	}
	if old, ok := s.records[key]; ok {
		s.remove(old)
	}
	s.add(&storedRecord{key: key, data: data, put: time.Now()}, owner)
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

// held is how many records there are, and their bytes with what they cost beside.
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
		owner.peer = "?" // nobody's: not to be the network itself
	}
	rec.owner = s.holder(owner, network)
	rec.inOwn = rec.owner.records.PushBack(rec)
	rec.inAge = s.byAge.PushBack(rec)
	s.records[rec.key] = rec
	s.count(rec.owner, rec.size())
}

// holder finds who is called id among the parts of parent, or makes it.
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

// count adds to what h and those above it hold, and forgets who holds nothing.
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
