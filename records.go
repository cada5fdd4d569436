package main

// The DHT's values: which are let in, and where they are kept. kad-dht's own
// store is an unbounded map, and it reads requests of up to 4 MiB; this one is
// bounded in records and bytes, and so is what a request may bring.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	ds "github.com/ipfs/go-datastore"
	pb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"google.golang.org/protobuf/encoding/protowire"
)

// recordPrefix begins every key that is stored.
const recordPrefix = "/privstack/"

// recordValidator accepts any value under recordPrefix within the bounds. What
// a value says is the clients' business.
type recordValidator struct{}

func (recordValidator) Validate(key string, value []byte) error {
	switch {
	case !strings.HasPrefix(key, recordPrefix) || len(key) == len(recordPrefix):
		return errors.New("key is not under " + recordPrefix)
	case len(key) > maxRecordKey:
		return fmt.Errorf("key of %d bytes is above %d", len(key), maxRecordKey)
	case len(value) == 0:
		return errors.New("value is empty")
	case len(value) > maxRecordValue:
		return fmt.Errorf("value of %d bytes is above %d", len(value), maxRecordValue)
	}
	return nil
}

// Select prefers values[0], which is the one arriving: all devices of a group
// share one key, and the last to write it must be the one found. A timestamp
// inside is no guide, because a device with a slow clock would never be.
func (recordValidator) Select(string, [][]byte) (int, error) { return 0, nil }

// rust-libp2p adds two fields to the record of the kad-dht spec, and its clients
// ignore a record without the first. Go's record type knows neither, so they
// travel as unknown fields.
// https://github.com/libp2p/rust-libp2p/blob/master/protocols/kad/src/generated/dht.proto
const (
	publisherField protowire.Number = 666 // bytes: the peer ID of who put it
	ttlField       protowire.Number = 777 // varint: seconds left to live

	// maxRecordExtra bounds both together, in bytes; a peer ID has at most 42.
	maxRecordExtra = 128
)

// boundRequest is kad-dht's hook before it handles a request. It leaves of a
// record what clients use, so that nothing else is stored or sent on, and takes
// the record away, which makes the handler refuse the request, if that is too
// much.
func boundRequest(req *pb.Message) {
	rec := req.GetRecord()
	if rec == nil {
		return
	}
	extra, err := knownExtra(rec.ProtoReflect().GetUnknown())
	if err != nil || len(extra) > maxRecordExtra {
		req.Record = nil
		return
	}
	rec.ProtoReflect().SetUnknown(extra)
}

// knownExtra returns the publisher and ttl fields in unknown, byte for byte.
func knownExtra(unknown []byte) ([]byte, error) {
	var extra []byte
	for len(unknown) > 0 {
		num, typ, n := protowire.ConsumeField(unknown)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		if num == publisherField && typ == protowire.BytesType || num == ttlField && typ == protowire.VarintType {
			extra = append(extra, unknown[:n]...)
		}
		unknown = unknown[n:]
	}
	return extra, nil
}

// recordStore keeps records in memory, the one put longest ago first to go. It
// is the datastore under kad-dht's value store, which calls Get, Put and Delete
// alone; the rest is the null datastore's, where nothing is.
type recordStore struct {
	ds.NullDatastore

	mu       sync.Mutex
	records  *simplelru.LRU[ds.Key, storedRecord] // ordered by the last Put
	bytes    int64                                // held by records, overhead included
	maxBytes int64
}

type storedRecord struct {
	data []byte // an encoded record
	put  time.Time
}

// recordOverhead is what an entry costs beside its key and data: the list
// element, the map's slot and two slice headers.
const recordOverhead = 256

func newRecordStore(maxRecords int, maxBytes int64) *recordStore {
	s := &recordStore{maxBytes: maxBytes}
	records, err := simplelru.NewLRU(maxRecords, func(key ds.Key, rec storedRecord) { s.bytes -= rec.size(key) })
	if err != nil {
		panic(err) // only for a size below one; limits gives at least 1024
	}
	s.records = records
	return s
}

func (r storedRecord) size(key ds.Key) int64 {
	return int64(len(key.String()) + len(r.data) + recordOverhead)
}

// Get returns the encoded record, or ds.ErrNotFound. It does not count as use.
func (s *recordStore) Get(_ context.Context, key ds.Key) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, ok := s.records.Peek(key)
	if !ok || time.Since(rec.put) > maxRecordAge {
		return nil, ds.ErrNotFound
	}
	return rec.data, nil
}

// Put keeps data, which the caller must not change, and drops what is too old or
// too much.
func (s *recordStore) Put(_ context.Context, key ds.Key, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records.Remove(key) // Add would replace it without a word to our count
	rec := storedRecord{data, time.Now()}
	s.records.Add(key, rec)
	s.bytes += rec.size(key)
	for {
		oldest, rec, ok := s.records.GetOldest()
		if !ok || s.bytes <= s.maxBytes && time.Since(rec.put) <= maxRecordAge {
			return nil
		}
		s.records.Remove(oldest)
	}
}

// Delete drops the record, if there is one.
func (s *recordStore) Delete(_ context.Context, key ds.Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records.Remove(key)
	return nil
}

// held is how many records there are, and their bytes with what they cost beside.
func (s *recordStore) held() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records.Len(), s.bytes
}

var _ ds.Batching = (*recordStore)(nil)

var errKadMessageTooLong = fmt.Errorf("DHT message is above %d bytes", maxKadMessage)

// boundedStream follows the frames that are read from it, each a varint length
// and as many bytes (kad-dht spec, RPC messages), and fails at a length above
// maxKadMessage: before the last byte of that length is handed out, so that the
// reader cannot yet allocate for it. It has one reader.
type boundedStream struct {
	network.Stream
	tally  *tally
	body   uint64 // bytes left of the current frame
	header []byte // of the next frame, while incomplete
}

func (s *boundedStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		if skip := min(s.body, uint64(len(rest))); skip > 0 {
			s.body -= skip
			rest = rest[skip:]
			continue
		}
		s.header = append(s.header, rest[0])
		rest = rest[1:]
		length, size := binary.Uvarint(s.header)
		switch {
		case size == 0 && len(s.header) < binary.MaxVarintLen64: // needs more
			continue
		case size <= 0 || length > maxKadMessage:
			s.tally.refuse(refusedMessage)
			return 0, errKadMessageTooLong
		}
		s.body, s.header = length, s.header[:0]
	}
	return n, err
}
