package kv

import (
	"errors"
	"fmt"
	"time"

	"github.com/tidwall/btree"
)

// maxMillis bounds clocks and labels, so that adding a TTL cannot overflow.
const maxMillis = 1 << 60

// validate returns the rules of a batch that its types do not express. Fields
// that do not count for an op are not looked at: the log does not carry them.
func (b *Batch) validate() error {
	if b.Node != 0 && b.Seq == 0 {
		return fmt.Errorf("a batch of node %d without a sequence number", b.Node)
	}
	for i := range b.Commands {
		c := &b.Commands[i]
		if err := c.validate(); err != nil {
			return fmt.Errorf("command %d: %w", i, err)
		}
	}
	return nil
}

func (c *Command) validate() error {
	if c.Wall < 0 || c.Wall > maxMillis {
		return fmt.Errorf("wall clock %d", c.Wall)
	}
	if c.Once != nil && (len(c.Once.Key) < 1 || len(c.Once.Key) > MaxOnceKey) {
		return fmt.Errorf("an idempotency key of %d bytes", len(c.Once.Key))
	}
	switch c.Op {
	case OpPut:
		if err := validPut(c.Key, c.TTL, c.Lease); err != nil {
			return err
		}
		return c.If.validate()
	case OpDelete:
		if err := validKey(c.Key); err != nil {
			return err
		}
		return c.If.validate()
	case OpDeleteRange:
		return c.Span.validate()
	case OpTxn:
		if c.Txn == nil {
			return errors.New("a transaction without content")
		}
		return c.Txn.validate()
	case OpGrant:
		return validTTL(c.TTL)
	case OpKeepAlive:
		if c.TTL != 0 {
			if err := validTTL(c.TTL); err != nil {
				return err
			}
		}
		return validLease(c.Lease)
	case OpRevoke:
		return validLease(c.Lease)
	case OpTick:
		return c.validateTick()
	}
	return fmt.Errorf("op %d", c.Op)
}

func (c *Command) validateTick() error {
	switch {
	case c.Once != nil:
		return errors.New("a tick with an idempotency key")
	case c.Tick.Clock < 0 || c.Tick.Clock > maxMillis:
		return fmt.Errorf("clock %d", c.Tick.Clock)
	case c.Tick.Wall < 0 || c.Tick.Wall > maxMillis:
		return fmt.Errorf("wall clock %d", c.Tick.Wall)
	}
	return nil
}

func validKey(key string) error {
	if len(key) == 0 || len(key) > MaxKeySize {
		return fmt.Errorf("a key of %d bytes", len(key))
	}
	return nil
}

func validPut(key string, ttl time.Duration, lease int64) error {
	if err := validKey(key); err != nil {
		return err
	}
	if ttl == 0 && lease == 0 {
		return nil
	}
	if ttl != 0 && lease != 0 {
		return errors.New("both a TTL and a lease")
	}
	if ttl != 0 {
		return validTTL(ttl)
	}
	return validLease(lease)
}

func validTTL(ttl time.Duration) error {
	if ttl < time.Millisecond || ttl > MaxTTL || ttl%time.Millisecond != 0 {
		return fmt.Errorf("a TTL of %v", ttl)
	}
	return nil
}

func validLease(id int64) error {
	if id < 1 {
		return fmt.Errorf("lease %d", id)
	}
	return nil
}

// validate bounds the ends of a span by one byte more than a key, which is what
// SingleKey needs.
func (s Span) validate() error {
	if len(s.Start) > MaxKeySize+1 || len(s.End) > MaxKeySize+1 {
		return fmt.Errorf("a span with ends of %d and %d bytes", len(s.Start), len(s.End))
	}
	return nil
}

func (p *Precondition) validate() error {
	switch p.Kind {
	case CheckNothing, CheckExists, CheckAbsent:
		return nil
	case CheckAnyOf, CheckNoneOf:
	default:
		return fmt.Errorf("precondition %d", p.Kind)
	}
	if len(p.Revisions) < 1 || len(p.Revisions) > MaxRevisions {
		return fmt.Errorf("a precondition on %d revisions", len(p.Revisions))
	}
	for _, r := range p.Revisions {
		if r < 0 {
			return fmt.Errorf("a precondition on revision %d", r)
		}
	}
	return nil
}

func (t *Txn) validate() error {
	if t.Each && (len(t.If) > 0 || len(t.Else) > 0) {
		return errors.New("comparisons or another branch where each operation stands alone")
	}
	for i := range t.If {
		if err := t.If[i].validate(); err != nil {
			return fmt.Errorf("comparison %d: %w", i, err)
		}
	}
	for _, branch := range [...][]TxnOp{t.Then, t.Else} {
		for i := range branch {
			if err := branch[i].validate(t.Each); err != nil {
				return fmt.Errorf("operation %d: %w", i, err)
			}
		}
		if !t.Each {
			if err := validBranch(branch); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Compare) validate() error {
	if err := validKey(c.Key); err != nil {
		return err
	}
	if c.Op < Equal || c.Op > Greater {
		return fmt.Errorf("operator %d", c.Op)
	}
	switch c.Target {
	case TargetModRevision, TargetCreateRevision, TargetVersion, TargetValue:
		return nil
	case TargetExists:
		if c.Op != Equal && c.Op != NotEqual || c.Number != 0 && c.Number != 1 {
			return fmt.Errorf("existence with operator %d and number %d", c.Op, c.Number)
		}
		return nil
	}
	return fmt.Errorf("target %d", c.Target)
}

func (o *TxnOp) validate(each bool) error {
	switch o.Op {
	case OpPut:
		return validPut(o.Key, o.TTL, o.Lease)
	case OpDeleteRange:
		return o.Span.validate()
	case OpGet:
		if each {
			return errors.New("a get where each operation stands alone")
		}
		if o.Limit < 0 || o.Limit > 1<<31-1 {
			return fmt.Errorf("limit %d", o.Limit)
		}
		return o.Span.validate()
	}
	return fmt.Errorf("op %d", o.Op)
}

// validBranch refuses what would need two events of one key at one revision: a
// key that is put twice, or put and then deleted. The set keeps an import of
// many thousand operations from taking quadratic time.
func validBranch(ops []TxnOp) error {
	if len(ops) < 2 {
		return nil
	}
	var put btree.Set[string]
	for i := range ops {
		o := &ops[i]
		switch o.Op {
		case OpPut:
			if put.Contains(o.Key) {
				return fmt.Errorf("operation %d: key %q is put twice", i, o.Key)
			}
			put.Insert(o.Key)
		case OpDeleteRange:
			var err error
			put.Ascend(o.Span.Start, func(key string) bool {
				if o.Span.Contains(key) {
					err = fmt.Errorf("operation %d: key %q is put and then deleted", i, key)
				}
				return false
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
